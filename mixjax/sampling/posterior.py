"""Draws from the posterior of a linear mixed model, and what is computed from them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, check_level, check_memory, warn
from mixjax.design import Design, Labels
from mixjax.engine.by_level import level_products
from mixjax.fitted.names import names_apart, term_names, terms_of_group
from mixjax.fitted.record import Fitted
from mixjax.markup import Report, Reported
from mixjax.prediction.asked import check_asked, effects_included, rows_asked
from mixjax.sampling import convergence
from mixjax.sampling.effects import draw_effects
from mixjax.sampling.loo import Loo, log_lik_by_level, loo_of
from mixjax.sampling.predictive import respond
from mixjax.sampling.priors import ModelPriors, Priors, names_of
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


class Posterior(Reported):
    """Draws from the posterior of a linear mixed model, as :func:`mixjax.bayes` returns them.

    Standard deviations are absolute. Draws stand in arrays ``(chains, draws, ...)``.
    """

    def __init__(
        self,
        fitted: Fitted,
        priors: Priors,
        model: ModelPriors,
        z: np.ndarray,
        beta: np.ndarray,
        sampling: Sampling,
        key: Any,
    ):
        self._fitted, self._key = fitted, key
        self.priors, self.model, self.z, self.beta, self.sampling = priors, model, z, beta, sampling

    # --- the model ----------------------------------------------------------------------------------------------------

    @property
    def reml_fit(self) -> Fitted:
        """The REML fit of the same model, at which the search for the mode began."""
        return self._fitted

    @property
    def design(self) -> Design:
        """Arrays of the model."""
        return self._fitted.design

    @property
    def labels(self) -> Labels:
        """Names of columns, effects and levels."""
        return self._fitted.labels

    @property
    def shape(self) -> tuple[int, int]:
        """Chains and draws of each."""
        return self.z.shape[0], self.z.shape[1]

    # --- draws of the parameters --------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Fixed effects, standard deviations and correlations, sigma."""
        names = names_of(self.design, self.labels)
        variances = [n for t, chart in enumerate(self.model.charts) for n in names.of_term(t, chart.structure)]
        variances.append("sigma")
        return (*names_apart(self.labels.fixed, variances), *variances)

    @cached_property
    def draws(self) -> np.ndarray:
        """``(chains, draws, parameters)`` in the order of :attr:`names`."""
        terms, log_sigma, _ = self.model.cut(np.moveaxis(self.z, -1, 0))
        natural = [chart.natural(part) for chart, part in zip(self.model.charts, terms, strict=True)]
        variances = np.concatenate([*natural, np.exp(log_sigma)[None]])
        return np.concatenate([self.beta, np.moveaxis(variances, 0, -1)], axis=-1)

    @property
    def sigma(self) -> np.ndarray:
        """``(chains, draws)`` residual standard deviations."""
        sigma: np.ndarray = np.exp(self.model.cut(np.moveaxis(self.z, -1, 0))[1])
        return sigma

    @property
    def Sigma(self) -> dict[str, np.ndarray]:
        """Dict term -> ``(chains, draws, q, q)`` covariances of its random effects, absolute."""
        names, shape = term_names(self.labels), self.shape
        return {
            name: np.einsum("acs,bcs->sab", F, F).reshape(*shape, *F.shape[:2])
            for name, F in zip(names, self._factors, strict=True)
        }

    def to_frame(self) -> pd.DataFrame:
        """A row for every draw: ``chain``, ``draw``, and a column for each parameter."""
        chains, draws = self.shape
        places = pd.MultiIndex.from_product([range(chains), range(draws)], names=["chain", "draw"])
        flat = self.draws.reshape(chains * draws, -1)
        return pd.DataFrame(flat, index=places, columns=list(self.names)).reset_index()

    @property
    def _factors(self) -> list[np.ndarray]:
        """Per term ``(q, q, S)``."""
        terms, _, _ = self.model.cut(self.z.reshape(-1, self.z.shape[-1]).T)
        return [chart.factor(part) for chart, part in zip(self.model.charts, terms, strict=True)]

    def _flat(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Factors ``(q, q, S)``, sigma ``(S,)``, beta ``(S, p)``."""
        return self._factors, self.sigma.ravel(), self.beta.reshape(-1, self.beta.shape[-1])

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

    # --- random effects -----------------------------------------------------------------------------------------------

    @cached_property
    def b(self) -> dict[str, np.ndarray]:
        """Dict term -> ``(chains, draws, levels, q)`` random effects, drawn exactly and jointly given each draw of the
        other parameters."""
        drawn = draw_effects(self.design, *self._flat(), self._rng(1))
        return {
            name: own.reshape(*self.shape, *own.shape[1:])
            for name, own in zip(term_names(self.labels), drawn, strict=True)
        }

    def ranef(self, stat: Literal["mean", "sd"] = "mean") -> dict[str, pd.DataFrame]:
        """Dict group -> data frame, levels by effects: posterior means of the random effects, or standard deviations.

        All draws are in :attr:`b`.
        """
        if stat not in ("mean", "sd"):
            raise ValueError(f"stat must be 'mean' or 'sd', got {stat!r}; draws are in .b")
        names, found = term_names(self.labels), {}
        for group, ts in terms_of_group(self.labels).items():
            parts = [getattr(self.b[names[t]], {"mean": "mean", "sd": "std"}[stat])(axis=(0, 1)) for t in ts]
            found[group] = pd.DataFrame(
                np.hstack(parts),
                index=list(self.labels.terms[ts[0]].levels),
                columns=[effect for t in ts for effect in self.labels.terms[t].effects],
            )
        return found

    # --- predictions --------------------------------------------------------------------------------------------------

    def predict(
        self,
        newdata: Any = None,
        random: bool | str | Sequence[str] = True,
        allow_new_levels: bool = False,
        interval: Literal["confidence", "prediction"] = "confidence",
        level: float = 0.95,
        draws: bool = False,
        key: Any = None,
    ) -> Any:
        """Means or new responses of the rows of the fit or of a new table, over the posterior.

        Args:
            newdata, random, allow_new_levels: as in :meth:`mixjax.LMMFit.predict`. Unknown levels have effects drawn
                from the distribution of levels, each row its own.
            interval: ``"confidence"``: of the mean. ``"prediction"``: of a new response, with the residual, and new
                effects of the terms that ``random`` leaves out.
            level: between quantiles. draws: True for the draws themselves, ``(chains x draws, rows)``, NaN in rows with
                missing values. key: of what is drawn anew; by default that of the posterior.

        Returns:
            data frame ``mean``, ``sd``, ``lower``, ``upper`` with the index of newdata; or an array.
        """
        check_asked(allow_new_levels, interval)
        check_level(level)
        if interval is None:
            raise ValueError("interval must be 'confidence' or 'prediction'")
        included = effects_included(self.labels, random)
        whole = "new response" if interval == "prediction" else None
        asked = rows_asked(self._fitted, newdata, included, allow_new_levels, whole)
        targets, (factors, sigma, beta) = asked.targets, self._flat()
        S, m = len(sigma), len(targets.X)
        check_memory(f"{S} draws of {m} rows", S * m * 8, "predict fewer rows at a time")
        flat = (
            tuple(own.reshape(S, *own.shape[2:]) for own in self.b.values()) if any(w.any() for w in included) else ()
        )
        b = flat or tuple(np.zeros((S, t.n_groups, np.shape(t.Z)[1])) for t in self.design.terms)
        values = targets.mean(beta, b)
        rng = self._rng(2, key)
        for Z, F in zip(targets.fresh(), factors, strict=True):
            if Z is not None and Z.any():
                values = values + np.einsum("mq,qrs,smr->sm", Z, F, rng.standard_normal((S, m, F.shape[0])))
        if targets.noise.any():
            values = values + sigma[:, None] * np.sqrt(targets.noise) * rng.standard_normal((S, m))
        rows = len(asked.index)
        if draws:
            out = np.full((S, rows), np.nan)
            out[:, asked.complete] = values
            return out
        lower, upper = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2), axis=0)
        columns = {"mean": values.mean(0), "sd": values.std(0, ddof=1), "lower": lower, "upper": upper}
        frame = pd.DataFrame(np.nan, index=asked.index, columns=list(columns))
        for name, column in columns.items():
            frame.loc[asked.complete, name] = column
        return frame

    def simulate(
        self, n: int | None = None, random: Literal["fitted", "new"] = "fitted", key: Any = None
    ) -> np.ndarray:
        """Posterior predictive responses of the rows of the fit ``(n, nobs)``, one for each of n draws.

        Args:
            n: how many; None for all draws. random: ``"fitted"``: of the same levels. ``"new"``: of new ones.
        """
        if random not in ("fitted", "new"):
            raise ValueError(f"random must be 'fitted' or 'new', got {random!r}")
        S = self.z.shape[0] * self.z.shape[1]
        count = S if n is None else check_count("n", n, 1, S)
        new = random == "new"
        responses: np.ndarray = (
            self._of_new_levels(key) if new else self.predict(interval="prediction", draws=True, key=key)
        )
        chosen: np.ndarray = responses[np.linspace(0, S - 1, count).round().astype(int)]
        return chosen

    def _of_new_levels(self, key: Any) -> np.ndarray:
        """Rows of a level share its new effects."""
        z, beta = self.z.reshape(-1, self.z.shape[-1]), self.beta.reshape(-1, self.beta.shape[-1])
        return respond(self.design, self.model, z, beta, self._rng(3, key))[0]

    # --- cross-validation ---------------------------------------------------------------------------------------------

    def log_lik(self, by: str | None = None) -> np.ndarray:
        """Log densities at every draw.

        Args:
            by: None: of the rows, given their random effects, ``(chains, draws, nobs)``. A grouping factor: of all rows
                of a level together, random effects integrated out, ``(chains, draws, levels)``; of the only factor, or
                the outermost of nested ones.
        """
        factors, sigma, beta = self._flat()
        if by is None:
            design = self.design
            mean = self.predict(draws=True)
            sd = sigma[:, None] * (1.0 if design.weights is None else 1.0 / np.sqrt(np.asarray(design.weights)))
            values = -0.5 * ((np.asarray(design.y) - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2.0 * np.pi)
        else:
            values = log_lik_by_level(self._products_by(by), factors, sigma, beta)
        found: np.ndarray = values.reshape(*self.shape, -1)
        return found

    def _products_by(self, by: str) -> Any:
        groups = [term.group for term in self.labels.terms]
        if by not in groups:
            known = ", ".join(map(repr, dict.fromkeys(groups)))
            raise ValueError(f"by must be a grouping factor of the model, {known}; got {by!r}")
        factor = self._fitted.layout.terms[groups.index(by)].factor
        try:
            return level_products(self.design, factor)
        except ValueError as error:
            raise ValueError(f"loo(by={by!r}) integrates over random effects level by level: {error}") from None

    def loo(self, by: str | None = None) -> Loo:
        """Expected log predictive density of what is left out, by Pareto-smoothed importance sampling.

        Args:
            by: None: row by row, given the other rows of its level, as brms and lme4's users know it: for new rows of
                the levels that were seen. A grouping factor: level by level, random effects integrated out: for new
                levels.

        Returns:
            :class:`~mixjax.sampling.loo.Loo`.

        Raises:
            ValueError: ``by`` is no grouping factor, or one whose levels share random effects with others, as crossed
                factors do.

        Warns:
            InferenceWarning: k-hat of some unit is above 0.7.
        """
        log_lik = self.log_lik(by)
        labels = self.labels
        if by is None:
            units, index = "rows", labels.frame.index
        else:
            units = by
            index = list(next(term.levels for term in labels.terms if term.group == by))
        flat = log_lik.reshape(-1, log_lik.shape[-1])
        total = len(flat)
        size = self.sampling.ess if self.sampling.method == "importance" else np.mean(convergence.ess_mean(self.draws))
        found = loo_of(flat, units, index, min(1.0, float(size) / total))
        if found.n_bad:
            warn(found._report().notes[0], InferenceWarning)
        return found

    # --- arviz --------------------------------------------------------------------------------------------------------

    def to_arviz(self, log_likelihood: bool = False, predictive: bool = False) -> Any:
        """ArviZ's InferenceData (from ArviZ 1 on a DataTree): parameters by name, random effects as ``b_<term>``, the
        response.

        Args:
            log_likelihood: add log densities of the rows. predictive: add posterior predictive responses.

        Raises:
            ImportError: arviz is not installed.
        """
        arviz = _arviz()
        draws = {name: self.draws[..., i] for i, name in enumerate(self.names)}
        coords: dict[str, list[str]] = {}
        dims: dict[str, list[str]] = {}
        for name, own, term in zip(self.b, self.b.values(), self.labels.terms, strict=True):
            draws[f"b_{name}"] = own
            dims[f"b_{name}"] = [f"level_{name}", f"effect_{name}"]
            coords |= {f"level_{name}": list(term.levels), f"effect_{name}": list(term.effects)}
        response = self.labels.response
        groups = {"posterior": draws, "observed_data": {response: np.asarray(self.design.y)}}
        if log_likelihood:
            groups["log_likelihood"] = {response: self.log_lik()}
        if predictive:
            groups["posterior_predictive"] = {response: self.simulate().reshape(*self.shape, -1)}
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
        function = getattr(_arviz(), f"plot_{kind}", None)
        if function is None:
            raise ValueError(f"arviz has no picture {kind!r}")
        return function(self.to_arviz(), **{"var_names": list(self.names), **options})


def _arviz() -> Any:
    try:
        import arviz
    except ImportError:
        raise ImportError("this needs arviz: pip install 'mixjax[bayes]'") from None
    return arviz
