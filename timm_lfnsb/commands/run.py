"""`timm-lfnsb run`."""
import click


@click.command(context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
@click.argument('script')
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...]) -> None:
    """Run one of timm's scripts with this zoo registered.

    SCRIPT is a path, or a name such as train.py in the folder that TIMM_SCRIPTS names (a clone of timm). All further
    arguments are the script's own; train.py also takes --cosine-harmony and friends, see `run train.py --help`.

    What train.py keeps from losing work: Order, augmentation, mixup, erasing and dropout of an epoch follow from --seed
    and its number. A run that was killed and goes on with --resume RUN/last.pth.tar in its own folder (the same
    --experiment) ends as an uninterrupted one, to the last bit on a CPU with as many workers, threads and processes,
    and keeps its best epoch. An output folder that cannot be written, and folders of images that the class map does not
    name, are refused before training. A full disk and a loss that is not finite end the run with one sentence;
    checkpoints that were written stay whole.

    What timm cannot do: a recovery-*.pth.tar resumes at the next epoch and skips the rest of its own; the state of
    --sched plateau is not in the checkpoint; streamed data, the NaFlex loader and --use-multi-epochs-loader do not
    repeat; GPU kernels need not repeat to the bit; keeping the best epoch over a restart needs timm 1.0.31.

    Several processes: torchrun --nproc-per-node N -m timm_lfnsb run train.py ...

    Several machines: torchrun --nnodes M --nproc-per-node N --rdzv-backend c10d --rdzv-id NAME --rdzv-endpoint
    HOST:29500 -m timm_lfnsb run train.py ... on each of them, HOST being one. All need the same versions, and
    --data-dir at the same path. Pictures of an epoch are split among the processes; --batch-size is that of one,
    --lr-base scales with all of them and --lr does not. The first process alone writes --output, so --resume needs a
    folder that all see. GPUs talk by NCCL, CPUs by gloo.
    """
    from ..train.launch import run_script
    run_script(script, args)
