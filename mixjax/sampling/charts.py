"""Unconstrained coordinates of the covariance of a term: logarithms of its standard deviations, then its correlations.

``u`` in (0, 1) stands for a correlation or a partial one, and its coordinate is Fisher's z, half the logit of u, or the
logit itself. Under ``lkj(eta)`` all u of a term are independent Beta variables, whatever the structure, so that the
prior with its Jacobian has a closed form:

* ``us``: partial correlations given the effects before (Lewandowski et al. 2009), column by column of the triangle;
* ``ar1``, ``hetar1``: the correlation of neighbours, ``det R = (1 - rho^2)^(q - 1)``;
* ``toep``, ``homtoep``: partial autocorrelations; the Jacobian of the autocorrelations is triangular
  (Barndorff-Nielsen & Schou 1973);
* ``adh``: correlations of neighbours, ``det R`` the product of ``1 - rho_i^2``;
* ``cs``, ``homcs``: ``(1 + (q - 1) rho) / q``, ``det R = (1 - rho)^(q - 1) (1 + (q - 1) rho)``.

For ``us`` these are not the log-Cholesky coordinates of :class:`mixjax.MarginalParams`: where a standard deviation is
near zero, those make a funnel of the posterior, in which samplers get stuck.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.covariance import Diagonal, HomogeneousCompoundSymmetry, Structure, Unstructured, stack_of
from mixjax.covariance.correlated import AnteDependence, CompoundSymmetry
from mixjax.covariance.custom import Written
from mixjax.covariance.factors import Loadings
from mixjax.covariance.scaled import Scaled
from mixjax.machine import Array, namespace

# Coordinates of correlations that a search starts from at most.
MOST_Z = 1.0


class Chart:
    """Coordinates of one structure: ``n_scales`` logarithms, then ``n_shapes`` others."""

    def __init__(self, structure: Structure):
        if isinstance(structure, Loadings):
            raise ValueError(
                "mixjax.bayes has no priors of loadings ('rr' and 'fa'): their signs and rotations make posteriors of "
                "several peaks; use 'us', or mixjax.lmm with a bootstrap"
            )
        self.structure = structure
        q = structure.q
        self.n_scales = sum(parameter.kind == "sd" for parameter in structure.natural)
        self.n_shapes = structure.k - self.n_scales
        # Parameters of the user's own have no range, and no prior that anybody could know.
        self.is_written = isinstance(structure, Written)
        self.from_zero = isinstance(structure, CompoundSymmetry | HomogeneousCompoundSymmetry)
        # Logit of u = factor times the coordinate.
        self.slope = 1.0 if self.from_zero else 2.0
        # The range of every correlation, where each coordinate is one by itself.
        self.low = -1.0 / (q - 1.0) if self.from_zero else -1.0
        self.separate = self.n_shapes == 1 or isinstance(structure, AnteDependence)

    @property
    def k(self) -> int:
        """Number of coordinates."""
        return self.n_scales + self.n_shapes

    def factor(self, z: Array) -> Array:
        """A factor ``(q, q, ...)`` of the absolute covariance at ``z (k, ...)``."""
        xp, structure, q = namespace(z), self.structure, self.structure.q
        if isinstance(structure, Unstructured) and q > 1:
            return stack_of(_triangle(xp.exp(z[:q]), z[q:], q))
        if isinstance(structure, HomogeneousCompoundSymmetry):
            u = 0.5 * (1.0 + xp.tanh(0.5 * z[1]))
            left = 0.5 * (1.0 - xp.tanh(0.5 * z[1]))
            roots = xp.stack([xp.sqrt(q * u), xp.sqrt(q / (q - 1.0) * left)])
            return structure.factor(xp.exp(z[:1]) * roots)
        if isinstance(structure, Unstructured | Diagonal) or not isinstance(structure, Scaled):
            return structure.factor(xp.exp(z))
        return structure.factor(structure.exponentials(z))

    def beta_of(self, eta: Any) -> tuple[Any, Any]:
        """Parameters ``(n_shapes,)`` of the Beta variables that the u are under ``lkj(eta)``."""
        n, q = self.n_shapes, self.structure.q
        if self.from_zero:
            return np.ones(n) * eta, np.ones(n) * ((q - 1) * (eta - 1.0) + 1.0)
        if isinstance(self.structure, Unstructured):
            column = np.concatenate([np.full(q - 1 - j, j) for j in range(q - 1)]) if n else np.zeros(0)
            both = eta + 0.5 * (q - 2 - column)
        elif isinstance(self.structure, AnteDependence):
            both = np.ones(n) * eta
        else:
            order = np.arange(n)  # of partial autocorrelations; ar1 has one, of all q - 1 steps
            both = (n - 1 - order) + (eta - 1.0) * (q - 1 - order) + 1.0
        return both, both

    def correlations(self, z: Array) -> Array:
        """The correlations ``(n_shapes, ...)`` of coordinates that are one each."""
        u = 0.5 * (1.0 + namespace(z).tanh(0.5 * self.slope * z[self.n_scales :]))
        return self.low + (1.0 - self.low) * u

    def log_slope(self, z: Array) -> Array:
        """``log d rho / dz`` of these, ``(n_shapes,)``."""
        xp = namespace(z)
        w = self.slope * z[self.n_scales :]
        return np.log((1.0 - self.low) * self.slope) - xp.logaddexp(0.0, w) - xp.logaddexp(0.0, -w)

    def natural(self, z: np.ndarray) -> np.ndarray:
        """The natural parameters ``(len(structure.natural), ...)``, absolute."""
        F = self.factor(z)
        Sigma = np.einsum("ac...,bc...->ab...", F, F)
        sd = np.sqrt(np.einsum("aa...->a...", Sigma))
        found = []
        for parameter in self.structure.natural:
            i, j = parameter.i, parameter.j
            if parameter.kind == "real":
                found.append(z[i])
            else:
                found.append(sd[i] if parameter.kind == "sd" else Sigma[i, j] / (sd[i] * sd[j]))
        return np.stack(found)

    def near(self, F: np.ndarray, least: np.ndarray) -> np.ndarray:
        """Coordinates ``(k,)``, well inside, of a covariance near ``F F'``, which may be singular.

        Args:
            least: ``(q,)`` standard deviations that count as small.
        """
        structure, q = self.structure, self.structure.q
        Sigma = F @ F.T
        inside = 0.98 * Sigma + np.diag(0.02 * Sigma.diagonal() + least**2)
        root = np.linalg.cholesky(inside)
        if isinstance(structure, Unstructured):
            scales = np.sqrt(inside.diagonal())
            C, shapes = root / scales[:, None], []
            left = np.ones(q)  # of each row's length, what the columns before leave
            for j in range(q - 1):
                partial = C[j + 1 :, j] / np.sqrt(left[j + 1 :])
                left[j + 1 :] *= 1.0 - partial**2
                shapes.append(np.arctanh(partial))
            z = np.concatenate([np.log(scales), *shapes])
        elif isinstance(structure, HomogeneousCompoundSymmetry):
            of_mean, of_differences = structure.near(root) ** 2
            total = of_mean + (q - 1) * of_differences
            z = np.array([0.5 * np.log(total / q), np.log(of_mean / ((q - 1) * of_differences))])
        elif isinstance(structure, Scaled):
            z = np.asarray(structure.logarithms(structure.near(root)))
        else:
            z = np.log(structure.near(root))
        free = self.n_shapes if self.is_written else 0
        limit = np.concatenate([np.full(self.k - self.n_shapes, np.inf), np.full(self.n_shapes, MOST_Z + free * 1e3)])
        inner: np.ndarray = np.clip(z, -limit, limit)
        return inner


def _triangle(sd: Array, z: Array, q: int) -> list[list[Array | None]]:
    """Cholesky factor of a covariance, from standard deviations and Fisher's z of partial correlations."""
    xp = namespace(sd, z)
    rows: list[list[Array | None]] = [[None] * q for _ in range(q)]
    left = [sd[i] for i in range(q)]
    at = 0
    for j in range(q):
        rows[j][j] = left[j]
        for i in range(j + 1, q):
            rows[i][j] = left[i] * xp.tanh(z[at])
            left[i] = left[i] / xp.cosh(z[at])
            at += 1
    return rows
