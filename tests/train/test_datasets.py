"""Training sets: the share of each class, and all randomness of an epoch, which follows from seed and epoch."""
from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.train_script import CPU, STANDIN, standin
from timm.data import FastCollateMixup, create_dataset, create_loader
from torch.utils.data import Dataset

from timm_lfnsb.train.datasets import BalancedDataset, SeededDataset, seed_epoch
from timm_lfnsb.train.launch import extend_train_script, load_module


@pytest.fixture(scope='module')
def imbalanced_folder(tmp_path_factory) -> Path:
    """Folders of 60, 15 and 4 images."""
    root = tmp_path_factory.mktemp('imbalanced')
    for label, count in {'happiness': 60, 'neutral': 15, 'sadness': 4}.items():
        for split in ('train', 'validation'):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new('L', (8, 8), i).save(root / split / label / f'{i}.png')
    return root


def balanced(folder: Path, power: float, seed: int = 0) -> BalancedDataset:
    return BalancedDataset(create_dataset('', root=str(folder), split='train', is_training=True), power, seed)


def drawn(dataset: BalancedDataset, epoch: int) -> torch.Tensor:
    """Class numbers of an epoch's images."""
    dataset.set_epoch(epoch)
    return torch.tensor([target for _, target in dataset.dataset.reader.samples])[dataset.indices]


@pytest.mark.parametrize('power, expected', [(0, (60, 15, 4)), (0.5, (7.75, 3.87, 2)), (1, (1, 1, 1))])
def test_the_balance_power_sets_the_share_of_each_class(power, expected, imbalanced_folder):
    dataset = balanced(imbalanced_folder, power)
    counts = torch.cat([drawn(dataset, epoch) for epoch in range(50)]).bincount(minlength=3)
    assert len(dataset) == 79 and counts.sum() == 50 * 79
    assert torch.equal(drawn(dataset, 3), drawn(balanced(imbalanced_folder, power), 3))  # whatever came before
    torch.testing.assert_close(counts / counts.sum(), torch.tensor(expected) / sum(expected), atol=0.03, rtol=0)


@pytest.mark.parametrize('choices', [None, [16, 32]])
def test_worker_processes_that_live_on_see_each_epochs_draw(choices, imbalanced_folder):
    """timm's own loader, plain and with --train-img-sizes, against the draw in the main process."""
    dataset = balanced(imbalanced_folder, 1)
    loader = create_loader(
        dataset, 8, 8, is_training=True, no_aug=True, num_workers=1, persistent_workers=True, use_prefetcher=False,
        input_size_choices=choices)
    seen = []
    for epoch in range(3):
        loader.dataset.set_epoch(epoch)
        seen.append(torch.cat([target for _, target in loader]).bincount(minlength=3))
        missing = drawn(dataset, epoch).bincount(minlength=3) - seen[-1]
        assert missing.sum() == 79 - 72 and (missing >= 0).all()  # the loader drops the last 7
    assert any(not torch.equal(counts, seen[0]) for counts in seen[1:])


def test_the_launcher_balances(imbalanced_folder, tmp_path):
    plain, same, power = (
        standin(tmp_path, '--data-dir', imbalanced_folder, *flags)['labels']
        for flags in ([], ['--balance-power', '0'], ['--balance-power', '1']))
    assert plain == same and plain[0] == plain[1] and [plain[0].count(i) for i in range(3)] == [60, 15, 4]
    assert power[0] != power[1] and all(16 <= epoch.count(i) <= 37 for epoch in power for i in range(3))


class Noise(Dataset):
    """Images that show what the random generators gave: python's, numpy's and torch's."""

    transform = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()]).view(4, 1, 1), 0


def draws(num_workers: int, epochs, seed: int = 0, rank: int = 0) -> dict[int, torch.Tensor]:
    """What a loader gives in each epoch, and the number after it."""
    loader = create_loader(
        SeededDataset(Noise(), seed, rank), (4, 1, 1), 3, is_training=True, num_workers=num_workers,
        use_prefetcher=False, device=CPU)
    seen = {}
    for epoch in epochs:
        seed_epoch(loader, seed, epoch, rank)
        batches = torch.cat([images.flatten(1) for images, _ in loader])
        seen[epoch] = torch.cat([batches.flatten(), torch.rand(1)])
    return seen


@pytest.mark.parametrize('num_workers', [0, 2])
def test_all_draws_of_an_epoch_depend_on_seed_and_epoch_alone(num_workers):
    """Also of workers that live on, and of this process after the loader is through."""
    whole = draws(num_workers, [0, 1, 2])
    torch.manual_seed(99)
    assert torch.equal(whole[2], draws(num_workers, [2])[2])
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[1], whole[2])
    assert not torch.equal(draws(num_workers, [0], seed=1)[0], whole[0])
    assert not torch.equal(draws(num_workers, [0], rank=1)[0][1::4], whole[0][1::4])
    # No two images of an epoch share their random numbers, nor do two workers.
    numbers = whole[0][:-1].view(-1, 4)[:, 1]
    assert numbers.unique().numel() == len(numbers)


def test_mixup_off_reaches_the_workers(face_folder):
    """timm switches its mixup off in a copy that worker processes which live on never see."""
    module = load_module(STANDIN)
    extend_train_script(module)
    module.parser.parse_args(['--mixup-off-epoch', '1'])
    loader = module.create_loader(
        create_dataset('', root=str(face_folder), split='train', is_training=True), (3, 32, 32), 6, is_training=True,
        num_workers=1, collate_fn=FastCollateMixup(mixup_alpha=1., num_classes=4, label_smoothing=0.), device=CPU)
    mixed = []
    for enabled in (True, False):
        loader.mixup_enabled = enabled
        mixed.append(any(bool(((target > 0).sum(1) > 1).any()) for _, target in loader))
    assert mixed == [True, False]


@pytest.mark.parametrize('flag', ['--use-multi-epochs-loader', '--naflex-loader'])
def test_loaders_that_cannot_be_seeded_are_warned_of(flag, tmp_path, caplog):
    assert standin(tmp_path, flag)['args']['no_epoch_seeds']
    assert flag in caplog.text and 'resumed' in caplog.text
