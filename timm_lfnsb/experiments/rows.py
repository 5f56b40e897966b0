"""The lines of each experiment's table: networks, losses, folds."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..losses import LOSSES
from ..train.feature_losses import feature_losses

FACTORS = (1, 0.1, 10)
"""The weights to choose from, as multiples of the paper's, which wins a tie."""

BASELINE = 'cross entropy'
ALL_LOSSES = (*LOSSES, 'cosine-harmony::variant=margin')


class Loss(NamedTuple):
    """A loss beside cross entropy, as --feature-loss takes it."""

    name: str
    weight: float
    settings: str = ''

    @classmethod
    def parse(cls, text: str) -> Loss:
        """Read NAME[:WEIGHT[:key=value,...]]; the weight is the paper's where it is left out.

        Raises:
            UserError: When the launcher would refuse it.
        """
        (name, settings), = feature_losses(Namespace(cosine_harmony=0, feature_loss=text)).items()
        weight = settings.pop('weight')
        return cls(name, weight, ','.join(f'{key}={value}' for key, value in settings.items()))

    def __str__(self) -> str:
        return f'{self.name}:{self.weight:g}' + (f':{self.settings}' if self.settings else '')

    @property
    def kind(self) -> str:
        """All but the weight."""
        return f'{self.name}:{self.settings}'.rstrip(':')

    @property
    def title(self) -> str:
        return f'+ {self.weight:g} {self.name}' + (f' ({self.settings})' if self.settings else '')


@dataclass(frozen=True)
class Row:
    """One line of a table: a network, a loss beside cross entropy, and the fold that is held out, if any."""

    name: str
    model: str
    loss: Loss | None = None
    fold: int | None = None

    @property
    def flags(self) -> list[str]:
        """Its options of train.py."""
        loss = ['--feature-loss', str(self.loss)] if self.loss else []
        return ['--model', self.model, '--cosine-harmony', '0', *loss]


def table_rows(experiment: str, recipe: Mapping[str, Any], folds: int) -> list[Row]:
    """The lines of one of the paper's tables: the recipe, with what the table is about changed."""
    alpha, variant = recipe.get('cosine_harmony_alpha', 0.1), recipe.get('cosine_harmony_variant', 'reference')
    learns = not recipe.get('cosine_harmony_fixed_centers')

    def harmony(variant: str = variant, alpha: float = alpha, learn_centers: bool = learns) -> Loss:
        settings = f'alpha={alpha:g},variant={variant}' + ('' if learn_centers else ',learn_centers=false')
        return Loss('cosine-harmony', recipe.get('cosine_harmony') or 1., settings)

    model = recipe.get('model', 'lfnsb')
    plain = Row(BASELINE, model)
    variants = [Row(f'+ {name}', model, harmony(name, learn_centers=True))
                for name in ('reference', 'paper', 'intended')]
    fixed = Row('+ intended, fixed centers', model, harmony('intended', learn_centers=False))
    networks = [Row(name, name, harmony()) for name in ('lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet')]
    return {
        'table2': networks,
        'table3': [plain, *variants, fixed],
        'table4': [Row(f'alpha {alpha}', model, harmony(alpha=alpha)) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)],
        'table5': [networks[1], networks[0]],
        'table9': [Row(f'fold {fold + 1}', model, harmony(), fold) for fold in range(folds)],
        'figure5': [plain, Row(f'+ {variant}', model, harmony())],
        'figure6': [Row(model, model, harmony())],
    }[experiment]


def weight_rows(model: str, losses: Sequence[Loss]) -> list[Row]:
    """Each loss with each of the weights to choose from."""
    # As they are written: 0.1 * 0.1 is another number than 0.01.
    weighted = [loss._replace(weight=float(f'{loss.weight * factor:g}')) for loss in losses for factor in FACTORS]
    return [Row(loss.title, model, loss) for loss in dict.fromkeys(weighted)]


def loss_rows(model: str, losses: Sequence[Loss]) -> list[Row]:
    """Cross entropy alone, and with each of the losses."""
    return [Row(BASELINE, model), *(Row(loss.title, model, loss) for loss in dict.fromkeys(losses))]
