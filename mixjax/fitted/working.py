"""The linear mixed model that a generalised one is at its modes: working responses and weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixjax.design import Design
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.products.family_rows import FamilyRows
from mixjax.products.rows import Rows, rows_of
from mixjax.products.sums import CrossProducts

# A weight of zero is this part of the largest: bases divide by no weight, and sums do not notice.
LEAST = 1e-14


def working_products(design: Design, rows: FamilyRows, est: GLMMEstimates) -> CrossProducts:
    """Cross-products of the linear mixed model with sigma = 1 whose likelihood of ``(beta, b)`` has the slope and the
    curvature of the generalised one's at the modes.

    Weights are the rows' observed curvatures ``c''``, responses ``eta - offset - c' / c''``. A family that is not
    log-concave may have rows with ``c'' < 0``: these are taken away from the sums of the others, so that sums are what
    they should be, negative weights and all. Only ``yy`` and the number of rows have no meaning then.
    """
    _, c1, c2, *_ = rows.family.derivatives(est.eta, rows.y, rows.size, rows.psi_by_row(est.psi)).by_eta
    if rows.weights is not None:
        c1, c2 = c1 * np.asarray(rows.weights), c2 * np.asarray(rows.weights)
    weights = np.maximum(np.abs(c2), LEAST * np.abs(c2).max(initial=1.0))
    signs = np.where(c2 < 0.0, -1.0, 1.0)
    offset = 0.0 if design.offset is None else np.asarray(design.offset)
    response = est.eta - offset - c1 / (signs * weights)
    own: Rows = rows_of(replace(design, y=response, offset=None, size=None, weights=weights))
    return own.stats if (signs > 0).all() else own.sums(signs)
