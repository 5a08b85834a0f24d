"""How MLflow shows the runs of a study: which columns its list has and in which order, and the charts beside it.

MLflow's pages keep a saved view in a tag of the experiment, offer it in their menu "Views", and take it from an
address. Its form is theirs (read and tried with 3.17); pages that do not know it show their usual list.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

KEY = "study"
TAG = f"mlflow.sharedViewState.{KEY}"
CURVES = ("sets/image_log_circular_variance", "sets/text_log_circular_variance", "train/images_per_second")
"""What else is drawn over the epochs."""
MOST_RUNS = 100
"""In one chart; with more, MLflow's pages become slow."""


def saved_view(swept: Sequence[str], metrics: Sequence[str], curve: str) -> str:
    """The value of the experiment's tag `TAG`: the best run first, with what was swept and what came of it.

    Args:
        swept: settings that vary, as parameters are called.
        metrics: columns of the list; by the first one, the higher the better, runs are sorted.
        curve: the metric that is drawn over the epochs.
    """
    target = metrics[0]
    parallel = {"type": "PARALLEL", "selectedParams": list(swept), "selectedMetrics": [target], "showAllRuns": True}
    charts = [parallel, *(_curve(metric) for metric in (curve, *CURVES))]
    named = {f"metrics.`{name}`": name for name in metrics} | {f"params.`{name}`": name for name in swept}
    state = {
        "orderByKey": f"metrics.`{target}`",
        "orderByAsc": False,
        "selectedColumns": [*named, "attributes.`Duration`"],
        "columnOrder": [*named, "attributes.`Duration`"],
        "columnWidths": {column: 45 + 7 * len(name) for column, name in named.items()},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": [_placed(chart, number) for number, chart in enumerate(charts)],
        "compareRunSections": [
            {"uuid": KEY, "name": "Study", "display": True, "isReordered": False, "columns": 1, "cardHeight": 420}
        ],
        "isAccordionReordered": True,  # else the sections are sorted by name
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": "Study", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def address(server: str, experiment_id: str, charts: bool = False) -> str:
    """Where the pages of `server` show the view: the list, or the charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}&workflowType=machine_learning{mode}"


def _placed(chart: dict[str, Any], number: int) -> dict[str, Any]:
    place = {"uuid": f"{KEY}-{number}", "metricSectionId": KEY, "deleted": False, "isGenerated": False}
    return chart | place | {"runsCountToCompare": MOST_RUNS}


def _curve(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "lineSmoothness": 0,
        "range": {},
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
