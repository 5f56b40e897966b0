"""All randomness of an epoch follows from seed and epoch."""
from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from support.train_script import CPU, STANDIN, standin
from timm.data import FastCollateMixup, create_dataset, create_loader
from torch.utils.data import Dataset

from timm_lfnsb.train.datasets import BalancedDataset, SeededDataset, mix_seed, seed_epoch
from timm_lfnsb.train.launch import extend_train_script, load_module


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


def test_seeds_do_not_collide_as_sums_would():
    seeds = {mix_seed(seed, epoch, rank, worker) for seed in range(4) for epoch in range(8) for rank in range(4)
             for worker in range(4)}
    assert len(seeds) == 4 * 8 * 4 * 4 and all(0 <= seed < 2 ** 32 for seed in seeds)
    assert mix_seed(-1, 0) != mix_seed(1, 0)


def test_the_seeded_dataset_is_the_dataset_it_wraps(face_folder):
    plain = create_dataset('', root=str(face_folder), split='train', is_training=True)
    dataset = SeededDataset(plain, 3)
    dataset.transform = len
    assert plain.transform is len and dataset.transform is len
    assert len(dataset) == 24 and dataset.reader is plain.reader and dataset.filename(5) == plain.filename(5)
    assert not hasattr(dataset, 'set_epoch') and hasattr(SeededDataset(BalancedDataset(plain, 1), 3), 'set_epoch')
    assert len(pickle.loads(pickle.dumps(dataset))) == 24  # for workers that are spawned


def test_mixup_off_reaches_the_workers(face_folder):
    """timm switches its mixup off in a copy that worker processes which live on never see."""
    module = load_module(STANDIN)
    module.parser.add_argument('--mixup-off-epoch', type=int, default=0)
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


@pytest.mark.parametrize('flag, word', [('--use-multi-epochs-loader', 'reads ahead'), ('--naflex-loader', 'NaFlex')])
def test_loaders_that_cannot_be_seeded_are_warned_of(flag, word, tmp_path, caplog):
    standin(tmp_path, flag)
    assert word in caplog.text and 'resumed' in caplog.text
