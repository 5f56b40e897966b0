"""`python -m timm_lfnsb`, which `torchrun -m timm_lfnsb` needs."""
from .cli import main

main()
