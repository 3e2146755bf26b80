"""The numbers of the paper's tables, to compare with ours."""

TABLE_2 = {
    "SD": {
        "MEL+hair": 63.74, "MEL+gel_bubble": 13.75, "MEL+ink": 0.2, "MEL+ruler": 76.56,
        "NV+hair": 44.37, "NV+gel_bubble": 13.54, "NV+ink": 0.1, "NV+ruler": 80.0,
    },
    "SD+RL": {
        "MEL+hair": 86.97, "MEL+gel_bubble": 94.37, "MEL+ink": 1.6, "MEL+ruler": 93.85,
        "NV+hair": 75.72, "NV+gel_bubble": 80.62, "NV+ink": 1.4, "NV+ruler": 87.18,
    },
}  # fmt: skip
"""APR in percent, 960 images a prompt."""

TABLE_3 = {
    "SD": {"apr": 18.28, "fid": 121.47, "lpips": 0.60},
    "SD+RL": {"apr": 63.14, "fid": 114.7, "lpips": 0.59},
}

TABLE_4 = {
    "real": {
        "hair": (0.91, 93.10), "gel_bubble": (0.66, 93.90),
        "ruler": (0.89, 96.95), "ink": (0.90, 99.72),
    },
    "sd_rl": {
        "hair": (0.92, 93.54), "gel_bubble": (0.70, 94.06),
        "ruler": (0.89, 97.03), "ink": (0.89, 99.68),
    },
    "sd": {
        "hair": (0.91, 93.26), "gel_bubble": (0.67, 93.90),
        "ruler": (0.85, 96.23), "ink": (0.86, 99.60),
    },
}  # fmt: skip
"""F1 and accuracy in percent; one seed, no interval."""
