"""The paper's tables as runs of timm's train script."""
