"""A stand-in for timm's train script, to test the launcher where no clone of timm is at hand.

It asks the same parsers for its arguments and looks up the same names, but makes one step and writes what it saw.
"""
import argparse
import json
from pathlib import Path

import torch
import yaml
from timm import utils  # noqa: F401
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='stand-in')
for option, default in {
        '--model': 'mobilefacenet', '--class-map': '', '--kd-model-name': None, '--kd-distill-type': 'logit',
        '--data-dir': None, '--dataset': '', '--train-split': 'train', '--val-split': 'validation',
        '--pretrained-path': None, '--initial-checkpoint': '', '--resume': '', '--output': '.', '--experiment': '',
        '--input-key': None}.items():
    parser.add_argument(option, default=default)
for option in ('--torchscript', '--naflex-loader', '--use-multi-epochs-loader', '--pretrained'):
    parser.add_argument(option, action='store_true')
for option in ('--mixup', '--cutmix'):
    parser.add_argument(option, type=float, default=0.)
for option, default in {'--aug-splits': 0, '--mixup-off-epoch': 0, '--num-classes': None, '--seed': 42}.items():
    parser.add_argument(option, type=int, default=default)


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    return task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))


def main():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        parser.set_defaults(**yaml.safe_load(Path(args_config.config).read_text()))
    args = parser.parse_args(remaining)
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=4, img_size=32)
    labels, transforms = [], []
    for training in (False, True) if args.data_dir else ():
        dataset = create_dataset(
            args.dataset, root=args.data_dir, split=args.train_split if training else args.val_split,
            is_training=training, class_map=args.class_map)
        loader = create_loader(
            dataset, (3, 32, 32), 4, is_training=training, num_workers=0, device=torch.device('cpu'))
        transforms.append([type(transform).__name__ for transform in loader.dataset.transform.transforms])
    if args.data_dir:
        dataset.transform = None
        for epoch in range(2):
            if hasattr(dataset, 'set_epoch'):
                dataset.set_epoch(epoch)
            labels.append([dataset[i][1] for i in range(len(dataset))])
    common = dict(criterion=torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), dtype=None, verbose=False)
    if args.kd_model_name is not None:
        task_class = {'logit': LogitDistillationTask, 'feature': FeatureDistillationTask,
                      'token': TokenDistillationTask}[args.kd_distill_type]
        task = task_class(student_model=model, teacher_model=args.kd_model_name, **common)
    else:
        task = ClassificationTask(model=model, **common)
    if args.data_dir:
        parts = train_one_epoch(0, model, loader, None, args, task=task)
    else:
        parts = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    Path(args.output, 'result.json').write_text(json.dumps({
        'args': vars(args), 'task': type(task).__name__, 'parts': {k: v.sum().item() for k, v in parts.items()},
        'labels': labels, 'transforms': transforms,
        'task_state': {name: {key: tensor.tolist() for key, tensor in loss.items()}
                       for name, loss in task.get_task_state().items()}}))


if __name__ == '__main__':
    main()
