"""Say where to find weights: `python3 download_checkpoint.py`, a command of the original system."""

from onevoice.extraction.checkpoint import read_registry

ORIGINAL = "https://drive.google.com/uc?id=1DPwnZa3iA-Fjn-SV0BLzW7KYvJywsd5L"
"""The checkpoint of the original system, by its own download script (https://github.com/ir4kgl/ss_dla)."""

if __name__ == "__main__":
    default = read_registry().default
    print(f"nothing to download: the weights {default} come with onevoice (eval.py --r {default})")
    print(f"for those of the original system, save {ORIGINAL} as checkpoints/final_run/checkpoint.pth")
