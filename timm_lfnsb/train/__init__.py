"""timm's train script with the losses of this zoo and more."""
