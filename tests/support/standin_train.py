"""A stand-in for timm's train script with its module-level contract.

That is config_parser, parser, create_dataset, ClassificationTask, LogitDistillationTask, train_one_epoch and main.

Just enough of it to test the launcher where no clone of timm is at hand.
"""
import argparse
import json
from pathlib import Path

import torch
import yaml
from timm.data import create_dataset
from timm.models import create_model
from timm.task import ClassificationTask, LogitDistillationTask

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='stand-in')
parser.add_argument('--model', default='mobilefacenet')
parser.add_argument('--class-map', default='')
parser.add_argument('--kd-model-name', default=None)
parser.add_argument('--kd-distill-type', default='logit')
parser.add_argument('--torchscript', action='store_true')
parser.add_argument('--naflex-loader', action='store_true')
parser.add_argument('--aug-splits', type=int, default=0)
parser.add_argument('--use-multi-epochs-loader', action='store_true')
parser.add_argument('--data-dir')
parser.add_argument('--dataset', default='')
parser.add_argument('--train-split', default='train')
parser.add_argument('--num-classes', type=int)
parser.add_argument('--pretrained', action='store_true')
parser.add_argument('--pretrained-path')
parser.add_argument('--initial-checkpoint', default='')
parser.add_argument('--resume', default='')
parser.add_argument('--seed', type=int, default=42)
parser.add_argument('--output', default='.')


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    raise NotImplementedError('the stand-in does not train')


def main():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        settings = yaml.safe_load(Path(args_config.config).read_text())
        known = {action.dest for action in parser._actions}
        if not set(settings) <= known:
            parser.error(f'unknown keys {set(settings) - known}')
        parser.set_defaults(**settings)
    args = parser.parse_args(remaining)
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=4, img_size=32)
    epochs = []
    if args.data_dir:
        dataset = create_dataset(
            args.dataset, root=args.data_dir, split=args.train_split, is_training=True, class_map=args.class_map)
        dataset.transform = None
        for epoch in range(2):
            if hasattr(dataset, 'set_epoch'):
                dataset.set_epoch(epoch)
            epochs.append([dataset[i][1] for i in range(len(dataset))])
    common = dict(criterion=torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), dtype=None, verbose=False)
    if args.kd_model_name is not None:
        task = LogitDistillationTask(student_model=model, teacher_model=args.kd_model_name, **common)
    else:
        task = ClassificationTask(model=model, **common)
    parts = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    Path(args.output, 'result.json').write_text(json.dumps({
        'args': vars(args), 'task': type(task).__name__, 'parts': {k: v.sum().item() for k, v in parts.items()},
        'epochs': epochs}))


if __name__ == '__main__':
    main()
