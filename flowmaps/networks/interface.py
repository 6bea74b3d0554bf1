"""Requirements on a network: the protocol that FlowMap and the trainer rely on, for the package's classes and yours."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

from diffusers.configuration_utils import register_to_config
from torch import Tensor

Init = TypeVar("Init", bound=Callable[..., None])


class Network(Protocol):
    """A two-time velocity network v(x, s, t, label): an ``nn.Module`` with this ``forward`` and a ``config``.

    **Calling it.** x is [B, ...], s <= t are floats [B] in [0, 1], the result has the shape of x. ``label`` is None,
    int64 [B] (``num_classes`` means "no label"), floats [B, *condition], or the float rows of
    ``networks.conditioning`` if the network takes a condition, augmentation parameters or guidance weights;
    ``conditioning.split_label`` unpacks all of them.

    **Constructor.** Subclass diffusers' ``ModelMixin`` and ``ConfigMixin`` and decorate ``__init__`` with
    ``registered``: its arguments are then saved with the weights and become config fields and flags, so they need type
    annotations and plain defaults. These names have a meaning elsewhere; leave out what the network does not have:

    * ``image_size`` and ``channels``, or ``dim`` for points: must agree with the shape of the data, and images are
      loaded at ``image_size``;
    * ``num_classes``: 0 for an unconditional network;
    * ``condition``: the shape of a condition in place of a class, empty for none;
    * ``augment_dim``: number of augmentation parameters that the label may carry;
    * ``guidance``: True if the network is conditioned on a guidance weight, ``guidance_interval`` if on its times too;
    * ``data_std``: the network divides its input and multiplies its output by it;
    * ``convention`` and ``base_std``: a published parametrisation and its noise level, for imported weights
      (``preconditioning.Preconditioned`` implements these two and ``data_std``).

    **Inside.** The loss differentiates through the network in forward mode, so a few layers are off limits:

    * no affine ``nn.GroupNorm`` or ``nn.LayerNorm``, and no ``F.layer_norm``: use ``layers.GroupNorm`` and
      ``layers.layer_norm``;
    * ``layers.Dropout`` instead of ``nn.Dropout``, so that passes of one step can share a mask;
    * for activation checkpointing, set ``_supports_gradient_checkpointing = True`` on the class and
      ``self.gradient_checkpointing = False`` in the constructor, and call large blocks by
      ``layers.run(self, block, *args)``; sharded training gathers the weights per item of a ``ModuleList``;
    * a part that only training needs (the second head of ``IMFDiT``) goes with a method ``for_sampling``, which returns
      a copy without it: averages and exports are of that;
    * initialise the last layer of whatever depends on t - s to zero if weights of a network with one time will be
      loaded: it is then the same function at s = t.

    Example:
        >>> class Affine(ModelMixin, ConfigMixin):
        ...     @registered
        ...     def __init__(self, dim: int = 2) -> None:
        ...         super().__init__()
        ...         self.layer = nn.Linear(dim + 2, dim)
        ...
        ...     def forward(self, x, s, t, label=None):
        ...         return self.layer(torch.cat([x, s[:, None], t[:, None]], dim=1))
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The constructor's arguments by name."""
        ...

    def forward(self, x: Tensor, s: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v_{s,t}(x), same shape as ``x``."""
        ...


def registered(init: Init) -> Init:
    """Record the constructor's arguments in ``self.config``: diffusers' ``register_to_config``, which is untyped.

    The type of ``init`` is kept, so that mypy checks calls of the constructor.
    """
    return cast(Init, register_to_config(init))
