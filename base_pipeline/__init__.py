"""How the embedded pipeline in `assets/base` was made."""
