"""Writes what timm's train script would, without training: a checkpoint EPOCH.pth.tar from beside it for each epoch.

It notes its arguments in calls.txt. Variables of the environment make it fail, wait, stop after an epoch, or have
another best epoch.
"""
import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for flag in ('--config', '--experiment', '--output', '--resume', '--data-dir', '--model', '--class-map'):
    parser.add_argument(flag, default='')
parser.add_argument('--epochs', type=int)
parser.add_argument('--seed', type=int)


def main():
    args, _ = parser.parse_known_args()
    here, name = Path(__file__).parent, Path(args.output).name
    with open(here / 'calls.txt', 'a') as file:
        file.write(json.dumps(sys.argv[1:]) + '\n')
    print('a line of the log')
    if os.environ.get('FAKE_FAIL', 'nothing') in name:
        sys.exit('CUDA out of memory, or so')
    if 'FAKE_SLEEP' in os.environ:
        (here / 'pid').write_text(str(os.getpid()))
        time.sleep(600)
    run = Path(args.output) / args.experiment
    run.mkdir(parents=True, exist_ok=True)
    start = int(Path(args.resume + '.epoch').read_text()) + 1 if args.resume else 0
    for epoch in range(start, args.epochs):
        with open(run / 'summary.csv', 'a') as file:
            if epoch == start:
                file.write('epoch,train_loss,eval_loss,eval_top1,lr\n')
            file.write(f'{epoch},{2 - 0.5 * epoch},{1.5 - 0.25 * epoch},{50 + epoch},0.1\n')
        shutil.copy(here / f'{epoch}.pth.tar', run / 'last.pth.tar')
        (run / 'last.pth.tar.epoch').write_text(str(epoch))
        shutil.copy(here / f'{epoch}.pth.tar', run / f'checkpoint-{epoch}.pth.tar')
        wanted, _, best = os.environ.get('FAKE_BEST', 'nothing:1').partition(':')
        if epoch <= (int(best) if wanted in name else 1):  # the last one of these is the best of all
            shutil.copy(here / f'{epoch}.pth.tar', run / 'model_best.pth.tar')
        if os.environ.get('FAKE_KILL') == f'{name}:{epoch}':
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get('FAKE_END') == f'{name}:{epoch}':
            return


if __name__ == '__main__':
    main()
