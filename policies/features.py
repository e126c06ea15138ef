"""Features of a model: what goes into its classifier, taken from the forward that answers anyway."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from policies.interfaces import Adaptation, Context, MethodParams, PolicyError


class Features:
    """Catches the features of each forward of a model.

    Features are the input of the module named ``layer``; by default that of the last `torch.nn.Linear` (one with K
    outputs, if there is one); in a model without any, what its method ``features`` returns. Where a linear layer takes
    several positions of a row, ``(B, ..., d)``, their mean counts.

    Args:
        model: Gets a hook on that module.
        layer: Name of the module; empty finds it.
        num_classes: ``K``.
        user: Name of the method, for messages.

    Raises:
        PolicyError: If the model offers no features.
    """

    def __init__(self, model: nn.Module, layer: str, num_classes: int, user: str) -> None:
        self._user = user
        self._held: Tensor | None = None
        self.head = _classifier(model, layer, num_classes, user)
        self._compute: Callable[[Tensor], Tensor] | None = getattr(model, "features", None)
        if self.head is None and not callable(self._compute):
            raise PolicyError(
                f"adaptation '{user}' needs features: the model has no torch.nn.Linear layer and no method 'features'; "
                "name the module whose input to take with 'layer', or choose 'none'"
            )
        self._hook = None if self.head is None else self.head.register_forward_pre_hook(self._capture)

    def _capture(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the classifier: keep its input."""
        self._held = args[0]

    def of(self, inputs: Tensor, rows: int) -> Tensor:
        """The features ``(rows, d)`` of the forward of ``inputs`` that has just run.

        Raises:
            PolicyError: If there are not as many rows of features.
        """
        features, self._held = self._held, None
        if features is None:
            assert self._compute is not None, "the classifier did not run"
            features = self._compute(inputs)
        if len(features) != rows:
            raise PolicyError(
                f"adaptation '{self._user}' got {len(features)} rows of features for {rows} rows of logits"
            )
        return pooled(features, self.head)

    def remove(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def pooled(features: Tensor, head: nn.Module | None) -> Tensor:
    """One row of features ``(B, d)`` for each row; of several positions that a linear layer takes, their mean."""
    if features.dim() > 2 and isinstance(head, nn.Linear):
        return features.flatten(1, -2).mean(1)
    return features.flatten(1)


def found_linear_head(model: nn.Module, num_classes: int) -> nn.Linear | None:
    """The classifier, where it is a linear layer with K outputs; else None."""
    head = _classifier(model, "", num_classes, "")
    return head if isinstance(head, nn.Linear) and head.out_features == num_classes else None


def _classifier(model: nn.Module, layer: str, num_classes: int, user: str) -> nn.Module | None:
    """The module whose input is the features, or None."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if layer:
        if layer not in modules:
            raise PolicyError(f"adaptation '{user}': the model has no module named {layer!r}")
        return modules[layer]
    linear = [module for module in modules.values() if isinstance(module, nn.Linear)]
    heads = [module for module in linear if module.out_features == num_classes] or linear
    return heads[-1] if heads else None


def linear_head(features: Features, num_classes: int, user: str) -> nn.Linear:
    """The classifier, where it is a linear layer with K outputs.

    Raises:
        PolicyError: If it is not.
    """
    head = features.head
    if not isinstance(head, nn.Linear) or head.out_features != num_classes:
        features.remove()
        raise PolicyError(
            f"adaptation '{user}' needs a classifier that is a torch.nn.Linear with {num_classes} outputs; "
            "name it with 'layer', or choose 'lame' or 'none'"
        )
    return head


class HeadParams(MethodParams):
    """Which layer is the classifier.

    Attributes:
        layer: Name of the classifier; empty finds it by itself.
    """

    layer: str = ""


class HeadAdaptation(Adaptation):
    """Base of methods that answer by what goes into a linear classifier and change no weights.

    A method forgets what it has gathered in `_forget`.

    Raises:
        PolicyError: If the classifier is not linear with K outputs.
    """

    def __init__(self, params: HeadParams, context: Context) -> None:
        super().__init__(params, context)
        self._features = Features(context.model, params.layer, context.num_classes, self.name)
        self._head = linear_head(self._features, context.num_classes, self.name)

    def _forget(self) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Return to the source model's weights and forget what was gathered."""
        super().reset()
        self._forget()

    def detach(self) -> None:
        """Remove the hook."""
        self._features.remove()
