"""The commands of `timm-lfnsb`: each module holds the click command of its own name, and no logic."""
