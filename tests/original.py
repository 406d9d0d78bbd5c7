"""Files in the shape of the original system, made of a network of this package through the documented names."""

import re
from typing import Any

import torch
from torch import Tensor

from onevoice.models import SpExPlus, SpExPlusConfig

ORIGINAL = SpExPlusConfig(
    sample_rate=8000, window_seconds=(0.005, 0.02, 0.04), filters=8, channels=8, hidden=16, blocks=3, stacks=2,
    speaker_dim=8, num_classes=4, normalize_level=False, norm_eps=1e-7, whole_frames=True,
)  # fmt: skip
"""The network of `original_config`: the original system has one width for all but the hidden channels."""

RENAMES = [
    (r"encoder\.scales\.0\.", "speech_encoder.short_encoder."),
    (r"encoder\.scales\.1\.", "speech_encoder.middle_encoder."),
    (r"encoder\.scales\.2\.", "speech_encoder.long_encoder."),
    (r"decoders\.0\.", "speech_decoder.decoder1."),
    (r"decoders\.1\.", "speech_decoder.decoder2."),
    (r"decoders\.2\.", "speech_decoder.decoder3."),
    (r"masks\.0\.", "speaker_extractor.head1.0."),
    (r"masks\.1\.", "speaker_extractor.head2.0."),
    (r"masks\.2\.", "speaker_extractor.head3.0."),
    (r"norm\.", "speaker_extractor.tail.0."),
    (r"bottleneck\.", "speaker_extractor.tail.1."),
    (r"classifier\.", "classificator.layers.0."),
    (r"speaker_encoder\.norm\.", "speaker_encoder.layers.0."),
    (r"speaker_encoder\.expand\.", "speaker_encoder.layers.1."),
    (r"speaker_encoder\.project\.", "speaker_encoder.layers.5."),
    (r"speaker_encoder\.blocks\.0\.", "speaker_encoder.layers.2."),
    (r"speaker_encoder\.blocks\.1\.", "speaker_encoder.layers.3."),
    (r"speaker_encoder\.blocks\.2\.", "speaker_encoder.layers.4."),
    (r"(speaker_encoder\.layers\.\d\.)conv1\.", r"\1first_layers.0."),
    (r"(speaker_encoder\.layers\.\d\.)norm1\.", r"\1first_layers.1."),
    (r"(speaker_encoder\.layers\.\d\.)prelu1\.", r"\1first_layers.2."),
    (r"(speaker_encoder\.layers\.\d\.)conv2\.", r"\1first_layers.3."),
    (r"(speaker_encoder\.layers\.\d\.)norm2\.", r"\1first_layers.4."),
    (r"(speaker_encoder\.layers\.\d\.)prelu2\.", r"\1last_layers.0."),
    (r"(speaker_encoder\.layers\.\d\.)skip\.", r"\1last_conv."),
    (r"temporal_blocks\.0\.", "speaker_extractor.tcn.0.first."),
    (r"temporal_blocks\.1\.", "speaker_extractor.tcn.0.layers.0."),
    (r"temporal_blocks\.2\.", "speaker_extractor.tcn.0.layers.1."),
    (r"temporal_blocks\.3\.", "speaker_extractor.tcn.1.first."),
    (r"temporal_blocks\.4\.", "speaker_extractor.tcn.1.layers.0."),
    (r"temporal_blocks\.5\.", "speaker_extractor.tcn.1.layers.1."),
    (r"(speaker_extractor\.tcn\..*)\.expand\.", r"\1.layers.0."),
    (r"(speaker_extractor\.tcn\..*)\.expand_prelu\.", r"\1.layers.1."),
    (r"(speaker_extractor\.tcn\..*)\.expand_norm\.weight", r"\1.layers.2.gamma"),
    (r"(speaker_extractor\.tcn\..*)\.expand_norm\.bias", r"\1.layers.2.beta"),
    (r"(speaker_extractor\.tcn\..*)\.depthwise\.", r"\1.layers.3."),
    (r"(speaker_extractor\.tcn\..*)\.depthwise_prelu\.", r"\1.layers.4."),
    (r"(speaker_extractor\.tcn\..*)\.depthwise_norm\.weight", r"\1.layers.5.gamma"),
    (r"(speaker_extractor\.tcn\..*)\.depthwise_norm\.bias", r"\1.layers.5.beta"),
    (r"(speaker_extractor\.tcn\..*)\.project\.", r"\1.layers.6."),
]
"""From names here to names there, applied one after the other, for the 2 × 3 temporal blocks of `ORIGINAL`."""


def their_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def their_shape(name: str, values: Tensor) -> Tensor:
    """Global norms have (channels, 1) there, and decoders (filters, 1, window)."""
    if name.endswith((".gamma", ".beta")):
        return values[:, None]
    return values[:, None] if re.fullmatch(r"speech_decoder\.decoder\d\.weight", name) else values


def random_network(seed: int = 0) -> SpExPlus:
    """A network of `ORIGINAL` with no weight at a symmetric initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SpExPlus(ORIGINAL)
        with torch.no_grad():
            for values in model.state_dict().values():
                if values.is_floating_point():
                    values.add_(0.1 * torch.rand_like(values))
    return model.eval()


class ConfigParser:
    """Stands in for the class of the original system whose object is in its checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self.resume = config, None


def original_checkpoint(model: SpExPlus, epoch: int = 1) -> dict[str, Any]:
    """The content of a `.pth`; the moments of Adam of parameter `number` are `number` and its square."""
    state = {their_name(name): values for name, values in model.state_dict().items()}
    state = {name: their_shape(name, values) for name, values in state.items()}
    parameters = [their_name(name) for name, _ in model.named_parameters()]
    order = [name for name in state if name in parameters]
    moments = {
        number: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full_like(state[name], number),
            "exp_avg_sq": torch.full_like(state[name], number**2),
        }
        for number, name in enumerate(order)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {
        "arch": "SpexPlus",
        "epoch": epoch,
        "state_dict": state,
        "optimizer": {"state": moments, "param_groups": [{**group, "params": list(range(len(order)))}]},
        "monitor_best": float("inf"),
        "config": ConfigParser({"preprocessing": {"sr": ORIGINAL.sample_rate}}),
    }


def original_config(train: str = "mixes/train", validation: str = "mixes/test", **trainer: Any) -> dict[str, Any]:
    """A config in the shape of the original system, of the network `ORIGINAL`."""

    def split(folder: str, batch_size: int) -> dict[str, Any]:
        parent, _, part = folder.rpartition("/")
        arguments = {"part": part, "data_dir": parent, "index_dir": "index"}
        data = {"type": "MixedLibrispeechDataset", "args": arguments}
        return {"batch_size": batch_size, "num_workers": 0, "datasets": [data]}

    sizes = {"num_classes": 4, "embed_dim": 8, "hidden": 8, "speaker_encoder_hidden": 16, "B": 3, "R": 2}
    cycle = {"steps_per_epoch": 9, "epochs": 3, "anneal_strategy": "cos", "max_lr": 0.002, "pct_start": 0.2}
    return {
        "name": "original",
        "n_gpu": 0,
        "preprocessing": {"sr": ORIGINAL.sample_rate},
        "augmentations": {"wave": []},
        "arch": {"type": "SpexPlus", "args": sizes},
        "data": {"train": split(train, 5), "val": split(validation, 1)},
        "optimizer": {"type": "Adam", "args": {"lr": 0.001}},
        "loss": {"type": "MultiLoss", "args": {}},
        "metrics": [{"type": "SISPDRMetric", "args": {}}, {"type": "PESQMetric", "args": {}}],
        "lr_scheduler": {"type": "OneCycleLR", "args": cycle},
        "trainer": {
            "epochs": 3, "save_dir": "saved/", "save_period": 5, "verbosity": 2, "monitor": "min val_loss",
            "early_stop": 100, "visualize": None, "wandb_project": "voices", **trainer,
        },
    }  # fmt: skip
