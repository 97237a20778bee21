"""Pictures of fits, with matplotlib: ``pip install "mixjax[plots]"``.

Every function takes a fit, or what a fit returned, and ``ax=`` to draw on; it returns the axes, or an array of them.
Colours, sizes and background are those of the style in force. Nothing is shown: ``ax.figure.savefig(...)``, or a
notebook, does that.
"""

from mixjax.plots.comparisons import contrasts, means
from mixjax.plots.curves import smooths
from mixjax.plots.levels import caterpillar, shrinkage
from mixjax.plots.lines import trellis
from mixjax.plots.panel import overview
from mixjax.plots.power import power_curve
from mixjax.plots.quantiles import qq, qq_ranef
from mixjax.plots.scatter import observed, residuals, scale_location
from mixjax.plots.uncertainty import bootstrap, profile_density, profile_zeta
from mixjax.plots.units import influence, variance_components

__all__ = [
    "bootstrap",
    "caterpillar",
    "contrasts",
    "influence",
    "means",
    "observed",
    "overview",
    "power_curve",
    "profile_density",
    "profile_zeta",
    "qq",
    "qq_ranef",
    "residuals",
    "scale_location",
    "shrinkage",
    "smooths",
    "trellis",
    "variance_components",
]
