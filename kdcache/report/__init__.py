"""Reports: what a cache holds, how students compare with their teacher, what a classifier says.

Each command is options in, a JSON-able result out, and a function that prints it on a rich console.
"""

from __future__ import annotations

from kdcache.report.evaluate import EvaluateOptions, evaluate
from kdcache.report.inspect import (
    ColumnSize,
    Guess,
    InspectOptions,
    InspectResult,
    PositionView,
    RowView,
    inspect,
    render_inspection,
)
from kdcache.report.metrics import (
    Calibration,
    Tally,
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    f1,
)
from kdcache.report.predict import Prediction, PredictOptions, PredictResult, predict
from kdcache.report.scores import EvaluateResult, ModelScores, render_evaluation

__all__ = [
    "Calibration",
    "ColumnSize",
    "EvaluateOptions",
    "EvaluateResult",
    "Guess",
    "InspectOptions",
    "InspectResult",
    "ModelScores",
    "PositionView",
    "PredictOptions",
    "PredictResult",
    "Prediction",
    "RowView",
    "Tally",
    "accuracy",
    "confusion_matrix",
    "evaluate",
    "expected_calibration_error",
    "f1",
    "inspect",
    "predict",
    "render_evaluation",
    "render_inspection",
]
