"""The trainer of tests: on the CPU, and silent."""

import lightning as L


def quiet_trainer(folder, *callbacks, **options):
    """Return a trainer that shows and writes nothing; options override what it is made of."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**quiet | options)
