"""Class balance: the share of each class, the draw of each epoch, the launcher."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from support.train_script import standin
from timm.data import ImageDataset, create_dataset, create_loader

from timm_lfnsb.train.datasets import BalancedDataset


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
def test_the_power_sets_the_share_of_each_class(power, expected, imbalanced_folder):
    dataset = balanced(imbalanced_folder, power)
    counts = torch.cat([drawn(dataset, epoch) for epoch in range(50)]).bincount(minlength=3)
    assert len(dataset) == 79 and counts.sum() == 50 * 79
    torch.testing.assert_close(counts / counts.sum(), torch.tensor(expected) / sum(expected), atol=0.03, rtol=0)


def test_the_draw_is_a_function_of_seed_and_epoch(imbalanced_folder):
    """So every rank makes the same draw, and a resumed run the one of the uninterrupted run."""
    a, b, other = (balanced(imbalanced_folder, 1, seed) for seed in (3, 3, 4))
    draws = []
    for epoch in (0, 1, 2):
        a.set_epoch(epoch)
        draws.append(a.indices.tolist())
    assert draws[0] != draws[1] != draws[2]
    b.set_epoch(2)
    other.set_epoch(2)
    assert b.indices.tolist() == draws[2] != other.indices.tolist()


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


def test_it_needs_a_folder():
    class Reader:
        def __len__(self):
            return 3

    with pytest.raises(ValueError, match='folder of images'):
        BalancedDataset(ImageDataset('', reader=Reader()), 1)
