"""The dashboard's kinds of panels in one style: large figures, curves, a heatmap, tables."""

from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# From Okabe and Ito's palette for all kinds of colour vision: the colours visible on both white and black.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#808080"
COLOURS = BLUE, VERMILLION, GREEN, PURPLE

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
RATIO = "percentunit"
MIN_INTERVAL = "15s"  # makes $__rate_interval at least a minute: on a CPU a step may take seconds


def query(expr: str, name: str = "", ref: str = "A") -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(name).ref_id(ref).range()


def headed(panel, title: str, description: str, width: int, height: int):
    """Set what panels of all kinds have in common."""
    return panel.title(title).description(description).datasource(SOURCE).span(width).height(height)


def figure(title: str, expr: str, unit: str, description: str, width: int, height: int = 5) -> stat.Panel:
    """Show the last value in large type; the final value of a finished run stays."""
    return (
        headed(stat.Panel(), title, description, width, height)
        .with_target(query(expr))
        .unit(unit)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.FIXED).fixed_color("text"))
        .graph_mode(options.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def figure_now(title: str, expr: str, unit: str, description: str, width: int, height: int = 5) -> stat.Panel:
    """Show the current value in large type, and a dash if there is none."""
    panel = figure(title, expr, unit, description, width, height)
    return panel.targets([query(expr).instant()]).no_value("–")


def coloured(panel: stat.Panel, steps: dict[float | None, str]) -> stat.Panel:
    """Colour a figure by its value. steps: colours by their lowest value; None is the lowest."""
    thresholds = [model.Threshold(value=value, color=colour) for value, colour in steps.items()]
    return panel.thresholds(
        dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(thresholds)
    ).color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))


def words(panel: stat.Panel, shown: dict[str, str]) -> stat.Panel:
    """Show words instead of the values 0, 1, 2 …; shown: words and background colours."""
    results = {
        str(value): model.ValueMappingResult(text=word, color=colour, index=value)
        for value, (word, colour) in enumerate(shown.items())
    }
    return (
        panel.mappings([model.ValueMap(options=results)])
        .color_mode(options.BigValueColorMode.BACKGROUND_SOLID)
        .color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.FIXED).fixed_color(GREY))
    )


def sized(panel: stat.Panel, pixels: int) -> stat.Panel:
    return panel.text(common.VizTextDisplayOptions().value_size(pixels))


def curves(
    title: str,
    shown: dict[str, str],
    unit: str,
    description: str,
    width: int = 8,
    otherwise: str = "no data",
    log: bool = False,
) -> timeseries.Panel:
    """Draw curves. shown: names and queries; a name with labels gives many curves in shades of a colour."""
    legend = common.VizLegendOptions().display_mode(options.LegendDisplayMode.LIST).show_legend(True)
    panel = (
        headed(timeseries.Panel(), title, description, width, 8)
        .interval(MIN_INTERVAL)
        .unit(unit)
        .no_value(otherwise)
        .line_width(2)
        .legend(legend.placement(options.LegendPlacement.BOTTOM).calcs(["lastNotNull"]))
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    )
    if log:
        panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    elif unit == RATIO:
        panel.min(0).max(1)
    else:
        panel.axis_soft_min(0)
    for ref, colour, (name, expr) in zip(ascii_uppercase, COLOURS, shown.items(), strict=False):
        mode = "shades" if "{{" in name else "fixed"
        panel.with_target(query(expr, name, ref)).override_by_query(
            ref, [model.DynamicConfigValue(id_val="color", value={"mode": mode, "fixedColor": colour})]
        )
    return panel


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL)).fill_opacity(60)


def buckets(title: str, expr: str, unit: str, description: str, width: int) -> heatmap.Panel:
    """Draw a histogram over time. expr: the increase of its buckets, by `le`."""
    return (
        headed(heatmap.Panel(), title, description, width, 8)
        .interval(MIN_INTERVAL)
        .with_target(query(expr, "{{le}}").format(PromQueryFormat.HEATMAP))
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Cividis").steps(64))
        .show_legend()
    )


def listing(
    title: str, target: prometheus.Dataquery, description: str, change: str, how: dict
) -> table.Panel:
    """List current series. change: the transformation of the query's result. how: its options."""
    return (
        headed(table.Panel(), title, description, 12, 9)
        .with_target(target.instant())
        .with_transformation(model.DataTransformerConfig(id_val=change, options=how))
        .align(options.FieldTextAlignment.LEFT)
        .no_value("none")
    )


def labels_of(title: str, expr: str, description: str) -> table.Panel:
    """List a series' labels, one per row."""
    return listing(title, query(expr), description, "labelsToFields", {"mode": "rows"})


def series_of(title: str, expr: str, description: str) -> table.Panel:
    """List series with their labels, one per row."""
    hidden = dict.fromkeys(("Time", "Value", "__name__"), True)
    return listing(
        title,
        query(expr).format(PromQueryFormat.TABLE),
        description,
        "organize",
        {"excludeByName": hidden, "indexByName": {}, "renameByName": {}},
    )
