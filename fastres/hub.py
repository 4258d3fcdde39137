"""Networks on the Hugging Face Hub: `fastres.hub.HubNetwork.from_pretrained("user/name")`.

Needs huggingface_hub: `pip install "fastres[export]"`. A folder that `fastres export --format hub`
wrote is read by either class: this one, or `fastres.load`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from fastres.config import StemName, ViewsName
from fastres.engine.checkpoint import check_tensors
from fastres.errors import FailureError
from fastres.inference.hub_files import WEIGHTS, read_plain_weights
from fastres.model.resnet import create_model

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:
    raise ImportError('fastres.hub needs huggingface_hub: pip install "fastres[export]"') from None

__all__ = ["HubNetwork"]


class HubNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fastres",
    pipeline_tag="image-classification",
    tags=["resnet", "cifar"],
):
    """A network of fastres that huggingface_hub can load, save and push.

    Files hold the weights under the keys of the plain network, without a prefix.

    Args:
        model: a name of `fastres.create_model`.
        classes: the name of each output.
        width: as in `fastres.create_model`.
        shortcut: as there.
        stem: as there.
        mean: of each channel, in 0..1, that images are normalised with.
        std: of each channel, as `mean`.
        tta: the test-time augmentation that it was evaluated with.
        dataset: what it was trained on.
        dataset_fingerprint: SHA-256 of that data, or empty.
    """

    def __init__(
        self,
        model: str = "resnet20",
        *,
        classes: Sequence[str],
        width: float = 1.0,
        shortcut: Literal["A", "B"] = "B",
        stem: StemName = "cifar",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        tta: ViewsName = "none",
        dataset: str = "",
        dataset_fingerprint: str = "",
    ):
        super().__init__()
        self.network = create_model(model, len(classes), width=width, shortcut=shortcut, stem=stem)
        self.classes, self.tta = tuple(classes), tta
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, 32, 32) to logits (N, classes)."""
        return self.network(images)

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        state = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(state, save_directory / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def _from_pretrained(cls, **words: Any) -> Any:
        # A stranger's config.json allocates nothing: the weights take the place of shapes.
        with torch.device("meta"):
            return super()._from_pretrained(**words)

    @classmethod
    def _load_as_safetensor(
        cls, model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        # Whatever `strict` is, which the mixin sets to False: a missing weight would be random.
        with torch.device("cpu"):
            weights = read_plain_weights(Path(model_file))
            check_tensors(weights, model.network.state_dict(), model_file)
            model.network.load_state_dict(dict(weights), assign=True)
            return model.to(torch.device(map_location)).eval()

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, *_: Any, **__: Any) -> NoReturn:
        raise FailureError(f"{model_file} is a pickle; fastres shares networks as {WEIGHTS}")
