"""One problem, one driver, one run directory; calibration data, patterns and scores."""

from typing import TYPE_CHECKING

from allot.lazy import lazily

if TYPE_CHECKING:
    from allot.run.api import *  # noqa: F403
    from allot.run.api import __all__ as __all__

lazily(__name__)
