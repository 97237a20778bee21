"""Draws from a posterior, of whatever model: their parameters by name, summaries, what speaks against them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.design import Labels
from mixjax.fitted.names import names_apart
from mixjax.markup import Report, Reported
from mixjax.sampling import convergence
from mixjax.sampling.loo import Loo, loo_of
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import Names
from mixjax.sampling.priors import Priors
from mixjax.simulation import key_words
from mixjax.tables import NotedTable, frame_report

# Beyond these, numbers are not to be trusted.
MOST_RHAT, LEAST_ESS = 1.01, 400


@dataclass(frozen=True)
class Sampling:
    """How the draws were made.

    Attributes:
        method: ``"nuts"`` or ``"importance"``.
        divergences: transitions that went astray; where there are any, part of the posterior was not reached.
        steps: mean number of gradients for a draw. step_size: of the integrator, in whitened coordinates.
        khat: Pareto shape of the importance weights, NaN of chains. ess: effective number of weighted draws, NaN of
            chains.
        first_call, seconds: of the first call of the sampling program, in which it is compiled or loaded, and of all.
    """

    method: str
    divergences: int = 0
    steps: float = float("nan")
    step_size: float = float("nan")
    khat: float = float("nan")
    ess: float = float("nan")
    first_call: float = 0.0
    seconds: float = 0.0


def of_rows(values: np.ndarray, index: pd.Index, complete: np.ndarray, level: float, draws: bool) -> Any:
    """Draws ``(S, m)`` of the complete rows of a table: with NaN in the others, or as a data frame ``mean``, ``sd``,
    ``lower``, ``upper`` between quantiles."""
    if draws:
        out = np.full((len(values), len(index)), np.nan)
        out[:, complete] = values
        return out
    lower, upper = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2), axis=0)
    columns = {"mean": values.mean(0), "sd": values.std(0, ddof=1), "lower": lower, "upper": upper}
    frame = pd.DataFrame(np.nan, index=index, columns=list(columns))
    for name, column in columns.items():
        frame.loc[complete, name] = column
    return frame


class Draws(Reported):
    """Draws from a posterior, in arrays ``(chains, draws, ...)``. What a kind of model adds is a class of its own."""

    priors: Priors
    model: ModelPriors
    z: np.ndarray
    beta: np.ndarray
    sampling: Sampling
    _key: Any

    @property
    @abstractmethod
    def labels(self) -> Labels:
        """Names of columns, effects and levels."""

    @property
    @abstractmethod
    def _names(self) -> Names:
        """Names of the parameters."""

    @property
    def shape(self) -> tuple[int, int]:
        """Chains and draws of each."""
        return self.z.shape[0], self.z.shape[1]

    # --- draws of the parameters --------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Fixed effects, standard deviations and correlations, parameters of residuals or of the family, sigma."""
        names = self._names
        variances = [n for t, chart in enumerate(self.model.charts) for n in names.of_term(t, chart.structure)]
        variances += names.others
        if self.model.sigma is not None:
            variances.append("sigma")
        return (*names_apart(self.labels.fixed, variances), *variances)

    @cached_property
    def draws(self) -> np.ndarray:
        """``(chains, draws, parameters)`` in the order of :attr:`names`."""
        z, model = np.moveaxis(self.z, -1, 0), self.model
        terms, _, _ = model.cut(z)
        parts = [chart.natural(part) for chart, part in zip(model.charts, terms, strict=True)]
        parts += [one.reported(own)[None] for one, own in zip(model.others, model.others_of(z), strict=True)]
        if model.sigma is not None:
            parts.append(np.exp(model.log_sigma_of(z))[None])
        variances = np.concatenate(parts)
        return np.concatenate([self.beta, np.moveaxis(variances, 0, -1)], axis=-1)

    def to_frame(self) -> pd.DataFrame:
        """A row for every draw: ``chain``, ``draw``, and a column for each parameter."""
        chains, draws = self.shape
        places = pd.MultiIndex.from_product([range(chains), range(draws)], names=["chain", "draw"])
        flat = self.draws.reshape(chains * draws, -1)
        return pd.DataFrame(flat, index=places, columns=list(self.names)).reset_index()

    @property
    def _factors(self) -> list[np.ndarray]:
        """Per term ``(q, q, S)``."""
        terms, _, _ = self.model.cut(self._z.T)
        return [chart.factor(part) for chart, part in zip(self.model.charts, terms, strict=True)]

    @property
    def _z(self) -> np.ndarray:
        """``(S, dim)`` of all chains."""
        return self.z.reshape(-1, self.z.shape[-1])

    @property
    def _beta(self) -> np.ndarray:
        """``(S, p)``."""
        return self.beta.reshape(-1, self.beta.shape[-1])

    def _covariances(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            name: np.einsum("acs,bcs->sab", F, F).reshape(*self.shape, *F.shape[:2])
            for name, F in zip(names, self._factors, strict=True)
        }

    def _rng(self, purpose: int, key: Any = None) -> np.random.Generator:
        return np.random.default_rng([*key_words(self._key if key is None else key), purpose])

    # --- summaries ----------------------------------------------------------------------------------------------------

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """Mean, standard deviation and central interval of every parameter, and how far the draws can be trusted.

        Args:
            level: of the intervals, between quantiles.

        Returns:
            data frame ``mean``, ``sd``, ``lower``, ``upper``, ``ess_bulk``, ``ess_tail``, ``rhat``, a row for each
            parameter; notes below it: method, divergences, and what is wrong. R-hat and effective sample sizes are
            those of Vehtari et al. (2021); of draws by importance there is one size, and no R-hat.
        """
        check_level(level)
        x = self.draws
        tails = (0.5 - level / 2, 0.5 + level / 2)
        lower, upper = np.quantile(x, tails, axis=(0, 1))
        columns = {"mean": x.mean((0, 1)), "sd": x.std((0, 1), ddof=1), "lower": lower, "upper": upper}
        frame = pd.DataFrame({**columns, **self._trust}, index=list(self.names))
        return NotedTable(frame, self.notes(level))

    @cached_property
    def _trust(self) -> dict[str, np.ndarray]:
        x, n = self.draws, len(self.names)
        if self.sampling.method == "importance":
            both = np.full(n, self.sampling.ess)
            return {"ess_bulk": both, "ess_tail": both, "rhat": np.full(n, np.nan)}
        return {
            "ess_bulk": convergence.ess_bulk(x), "ess_tail": convergence.ess_tail(x), "rhat": convergence.rhat(x),
        }  # fmt: skip

    def notes(self, level: float = 0.95) -> tuple[str, ...]:
        """What stands below the summary."""
        how, (chains, draws) = self.sampling, self.shape
        if how.method == "importance":
            made = f"{chains * draws} draws by importance sampling; Pareto k-hat {how.khat:.2f}"
        else:
            made = (
                f"{chains} chains of {draws} draws by NUTS, {how.steps:.1f} gradients a draw; "
                f"{how.divergences or 'no'} divergences"
            )
        return (
            f"{100 * level:g} % intervals between quantiles",
            made,
            *(f"warning: {text}" for text in self.problems()),
        )

    def problems(self) -> list[str]:
        """What speaks against the draws, in sentences; empty where nothing does."""
        how, trust, found = self.sampling, self._trust, []
        if how.divergences:
            found.append(
                f"{how.divergences} of {self.z.shape[0] * self.z.shape[1]} transitions diverged: part of the posterior "
                "may not have been reached; raise target= towards 0.99, or give tighter priors"
            )
        worst = float(np.nanmax(trust["rhat"])) if np.isfinite(trust["rhat"]).any() else float("nan")
        if worst > MOST_RHAT:
            name = self.names[int(np.nanargmax(trust["rhat"]))]
            found.append(f"R-hat of {name} is {worst:.3f} (more than {MOST_RHAT}): chains have not mixed; more warmup=")
        least = np.minimum(trust["ess_bulk"], trust["ess_tail"])
        if np.nanmin(least) < LEAST_ESS:
            name = self.names[int(np.nanargmin(least))]
            found.append(f"the effective sample size of {name} is {np.nanmin(least):.0f}: take more draws=")
        if how.khat > 0.7:
            found.append(f"Pareto k-hat of the weights is {how.khat:.2f} (more than 0.7): use method='nuts'")
        return found

    def warn(self) -> None:
        """An :class:`~mixjax.InferenceWarning` for each of :meth:`problems`."""
        for text in self.problems():
            warn(text, InferenceWarning)

    def _report(self) -> Report:
        frame = pd.DataFrame(self.summary()).rename(columns={"mean": "estimate", "sd": "std_error"})
        heads = ["Mean", "SD", "Lower", "Upper", "Bulk ESS", "Tail ESS", "R-hat"]
        formats = {"ess_bulk": "{:.0f}", "ess_tail": "{:.0f}", "rhat": "{:.3f}"}
        return frame_report(frame, [f"Posterior of {self.labels.formula}"], self.notes(), heads=heads, formats=formats)

    def __repr__(self) -> str:
        return self._report().text()

    # --- cross-validation ---------------------------------------------------------------------------------------------

    def _loo(self, log_lik: np.ndarray, units: str, index: Any) -> Loo:
        flat = log_lik.reshape(-1, log_lik.shape[-1])
        size = self.sampling.ess if self.sampling.method == "importance" else np.mean(convergence.ess_mean(self.draws))
        found = loo_of(flat, units, index, min(1.0, float(size) / len(flat)))
        if found.n_bad:
            warn(found._report().notes[0], InferenceWarning)
        return found

    # --- arviz --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def to_arviz(self, log_likelihood: bool = False, predictive: bool = False) -> Any:
        """ArviZ's InferenceData."""

    def _to_arviz(self, b: dict[str, np.ndarray], y: np.ndarray, more: dict[str, Any]) -> Any:
        arviz = arviz_()
        draws = {name: self.draws[..., i] for i, name in enumerate(self.names)}
        coords: dict[str, list[str]] = {}
        dims: dict[str, list[str]] = {}
        for (name, own), term in zip(b.items(), self.labels.terms, strict=False):
            draws[f"b_{name}"] = own
            dims[f"b_{name}"] = [f"level_{name}", f"effect_{name}"]
            coords |= {f"level_{name}": list(term.levels), f"effect_{name}": list(term.effects)}
        response = self.labels.response
        groups = {"posterior": draws, "observed_data": {response: y}}
        groups |= {name: {response: own} for name, own in more.items()}
        by_keyword = "posterior" in inspect.signature(arviz.from_dict).parameters
        return arviz.from_dict(**groups, coords=coords, dims=dims) if by_keyword else arviz.from_dict(
            groups, coords=coords, dims=dims
        )  # fmt: skip

    def plot(self, kind: str = "trace", **options: Any) -> Any:
        """A picture by ArviZ: its function ``plot_<kind>``, of the parameters: ``"trace"``, ``"pair"``, ``"forest"``,
        ``"rank"``, ...

        Args:
            options: of that function; ``var_names`` are by default all parameters but random effects.
        """
        function = getattr(arviz_(), f"plot_{kind}", None)
        if function is None:
            raise ValueError(f"arviz has no picture {kind!r}")
        return function(self.to_arviz(), **{"var_names": list(self.names), **options})


def arviz_() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import arviz
    except ImportError:
        raise ImportError("this needs arviz: pip install 'mixjax[bayes]'") from None
    return arviz
