"""A stand-in for timm's train script with its module-level contract: config_parser, parser, ClassificationTask, main.

Just enough of it to test the launcher where no clone of timm is at hand.
"""
import argparse
import json
from pathlib import Path

import torch
import yaml
from timm.models import create_model
from timm.task import ClassificationTask

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='stand-in')
parser.add_argument('--model', default='mobilefacenet')
parser.add_argument('--class-map', default='')
parser.add_argument('--kd-model-name', default=None)
parser.add_argument('--torchscript', action='store_true')
parser.add_argument('--naflex-loader', action='store_true')
parser.add_argument('--aug-splits', type=int, default=0)
parser.add_argument('--output', default='.')


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
    task = ClassificationTask(
        model=model, criterion=torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), dtype=None, verbose=False)
    parts = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    Path(args.output, 'result.json').write_text(json.dumps({
        'args': vars(args), 'task': type(task).__name__, 'parts': {k: v.sum().item() for k, v in parts.items()}}))


if __name__ == '__main__':
    main()
