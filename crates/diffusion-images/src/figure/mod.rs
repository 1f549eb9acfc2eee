//! Figures as SVG files: lines, points, trajectories and histograms.
//!
//! Every function writes one file in one step (see [`crate::picture::write_file`]). The drawing
//! itself is done by the `plotters` library; text is left to the viewer's sans-serif font.

mod axis;

pub use axis::Scale;

use crate::picture::write_file;
use axis::Axis;
use diffusion_core::{Error, Report, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// The texts and scales of a figure.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Axes {
    /// Above the figure.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: String,
    /// Beside the vertical axis.
    pub y_label: String,
    /// Of the horizontal axis.
    pub x_scale: Scale,
    /// Of the vertical axis.
    pub y_scale: Scale,
}

impl Axes {
    /// Linear axes with these texts.
    pub fn new(
        title: impl Into<String>,
        x_label: impl Into<String>,
        y_label: impl Into<String>,
    ) -> Self {
        Self {
            title: title.into(),
            x_label: x_label.into(),
            y_label: y_label.into(),
            ..Self::default()
        }
    }

    /// With a logarithmic horizontal axis.
    pub fn log_x(self) -> Self {
        Self {
            x_scale: Scale::Log,
            ..self
        }
    }

    /// With a logarithmic vertical axis.
    pub fn log_y(self) -> Self {
        Self {
            y_scale: Scale::Log,
            ..self
        }
    }

    fn shows(&self, (x, y): (f64, f64)) -> bool {
        self.x_scale.shows(x) && self.y_scale.shows(y)
    }
}

/// Points under one name; an empty name stays out of the legend.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// Horizontal and vertical values. Points that an axis cannot show interrupt a line.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// Points under a name.
    pub fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.into(),
            points,
        }
    }
}

/// Colours that colour-blind people can tell apart (Okabe and Ito 2008), black last.
const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(40, 40, 40),
];
const INK: RGBColor = RGBColor(60, 60, 60);
const FAINT: RGBColor = RGBColor(228, 228, 228);
const WIDE: (u32, u32) = (720, 460);
const SQUARE: (u32, u32) = (600, 600);

/// Lines through the points of each series, in their order.
///
/// # Errors
/// No point that can be shown; the file cannot be written.
pub fn line_plot(path: &Path, axes: &Axes, series: &[Series]) -> Result<()> {
    let (x, y) = ranges(axes, series)?;
    write(path, WIDE, |root| {
        let mut chart = frame(root, axes, x, y)?;
        for (i, one) in series.iter().enumerate() {
            let style = COLORS[i % COLORS.len()].stroke_width(2);
            for (piece, points) in pieces(axes, &one.points).into_iter().enumerate() {
                let dot = (points.len() == 1).then(|| points[0]);
                // When the colours are used up they come again, dashed.
                let dashed = i >= COLORS.len();
                let line = if dashed {
                    chart.draw_series(DashedLineSeries::new(points, 6, 4, style))
                } else {
                    chart.draw_series(LineSeries::new(points, style))
                }
                .map_err(drawing)?;
                if piece == 0 && !one.name.is_empty() {
                    line.label(one.name.clone()).legend(move |(x, y)| {
                        let end = if dashed { x + 6 } else { x + 16 };
                        PathElement::new([(x, y), (end, y)], style)
                    });
                }
                if let Some(point) = dot {
                    let circle = Circle::new(point, 3, style.filled());
                    chart.draw_series([circle]).map_err(drawing)?;
                }
            }
        }
        legend(&mut chart, series)
    })
}

/// A dot for each point; the figure is square so that shapes of two-dimensional data keep theirs.
///
/// # Errors
/// No point that can be shown; the file cannot be written.
pub fn scatter(path: &Path, axes: &Axes, series: &[Series]) -> Result<()> {
    let (x, y) = ranges(axes, series)?;
    write(path, SQUARE, |root| {
        let mut chart = frame(root, axes, x, y)?;
        for (i, one) in series.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let dots = one.points.iter().filter(|&&point| axes.shows(point));
            let dots = dots.map(|&point| Circle::new(point, 2, color.mix(0.55).filled()));
            let drawn = chart.draw_series(dots).map_err(drawing)?;
            if !one.name.is_empty() {
                drawn
                    .label(one.name.clone())
                    .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
            }
        }
        legend(&mut chart, series)
    })
}

/// A thin line for each series, with a dot where it ends: paths of samples.
///
/// Series of one name share a colour and one line of the legend.
///
/// # Errors
/// No point that can be shown; the file cannot be written.
pub fn trajectories(path: &Path, axes: &Axes, series: &[Series]) -> Result<()> {
    let (x, y) = ranges(axes, series)?;
    let mut names: Vec<&str> = Vec::new();
    for one in series {
        if !names.contains(&one.name.as_str()) {
            names.push(&one.name);
        }
    }
    write(path, WIDE, |root| {
        let mut chart = frame(root, axes, x, y)?;
        for (i, name) in names.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let mut ends = Vec::new();
            for one in series.iter().filter(|one| one.name == *name) {
                for points in pieces(axes, &one.points) {
                    ends.extend(points.last().copied());
                    let line = LineSeries::new(points, color.mix(0.4).stroke_width(1));
                    chart.draw_series(line).map_err(drawing)?;
                }
            }
            let dots = ends
                .into_iter()
                .map(|end| Circle::new(end, 2, color.filled()));
            let drawn = chart.draw_series(dots).map_err(drawing)?;
            if !name.is_empty() {
                drawn.label(*name).legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2))
                });
            }
        }
        legend(&mut chart, series)
    })
}

/// Bars of equal width whose areas sum to 1, with curves (densities, for instance) over them.
///
/// # Errors
/// No finite value, no bin, a logarithmic axis; the file cannot be written.
pub fn histogram(
    path: &Path,
    axes: &Axes,
    values: &[f64],
    bins: usize,
    curves: &[Series],
) -> Result<()> {
    if bins == 0 || axes.x_scale == Scale::Log || axes.y_scale == Scale::Log {
        let found = format!(
            "{bins} bins, axes {:?} and {:?}",
            axes.x_scale, axes.y_scale
        );
        return Err(Report::new("histogram", found)
            .expected("at least one bin and linear axes")
            .config());
    }
    let bars = density(values, bins);
    let corners = Series::new(
        "",
        bars.iter().flat_map(|b| [(b.0, b.2), (b.1, b.2)]).collect(),
    );
    let all: Vec<Series> = [&[corners], curves].concat();
    let (x, y) = ranges(axes, &all)?;
    write(path, WIDE, |root| {
        let mut chart = frame(root, axes, x, y.starting_at_zero())?;
        let bars = bars.iter().map(|&(low, high, height)| {
            Rectangle::new([(low, 0.0), (high, height)], COLORS[4].mix(0.6).filled())
        });
        chart.draw_series(bars).map_err(drawing)?;
        for (i, one) in curves.iter().enumerate() {
            let style = COLORS[(i + 1) % COLORS.len()].stroke_width(2);
            for (piece, points) in pieces(axes, &one.points).into_iter().enumerate() {
                // When the colours are used up they come again, dashed.
                let dashed = i >= COLORS.len();
                let line = if dashed {
                    chart.draw_series(DashedLineSeries::new(points, 6, 4, style))
                } else {
                    chart.draw_series(LineSeries::new(points, style))
                }
                .map_err(drawing)?;
                if piece == 0 && !one.name.is_empty() {
                    line.label(one.name.clone()).legend(move |(x, y)| {
                        let end = if dashed { x + 6 } else { x + 16 };
                        PathElement::new([(x, y), (end, y)], style)
                    });
                }
            }
        }
        legend(&mut chart, curves)
    })
}

/// Low end, high end and density of each bin over the range of the finite values.
fn density(values: &[f64], bins: usize) -> Vec<(f64, f64, f64)> {
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    if finite.is_empty() {
        return Vec::new();
    }
    let low = finite.iter().copied().fold(f64::INFINITY, f64::min);
    let high = finite.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if high > low {
        (low, high)
    } else {
        (low - 0.5, high + 0.5)
    };
    let width = (high - low) / bins as f64;
    let mut counts = vec![0usize; bins];
    for value in &finite {
        counts[(((value - low) / width) as usize).min(bins - 1)] += 1;
    }
    let at = |bin: usize| low + bin as f64 * width;
    let total = finite.len() as f64 * width;
    counts
        .iter()
        .enumerate()
        .map(|(i, &n)| (at(i), at(i + 1), n as f64 / total))
        .collect()
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;

/// Only points that both axes can show count for the ranges.
fn ranges(axes: &Axes, series: &[Series]) -> Result<(Axis, Axis)> {
    let points = || {
        series
            .iter()
            .flat_map(|s| s.points.iter().copied())
            .filter(|&p| axes.shows(p))
    };
    Ok((
        Axis::around(&axes.x_label, axes.x_scale, points().map(|p| p.0))?,
        Axis::around(&axes.y_label, axes.y_scale, points().map(|p| p.1))?,
    ))
}

/// Runs of points that can be shown.
fn pieces(axes: &Axes, points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    points
        .split(|&point| !axes.shows(point))
        .filter(|run| !run.is_empty())
        .map(<[_]>::to_vec)
        .collect()
}

fn write(path: &Path, size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<()> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(drawing)?;
        draw(&root)?;
        root.present().map_err(drawing)?;
    }
    write_file(path, svg.as_bytes())
}

fn drawing<E: std::error::Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> Error {
    Report::new("figure", error)
        .remedy("check the numbers that are drawn")
        .input()
}

fn frame<'a, 'b: 'a>(root: &'a Area<'b>, axes: &Axes, x: Axis, y: Axis) -> Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(root)
        .caption(&axes.title, ("sans-serif", 20).into_font().color(&INK))
        .margin(14)
        .x_label_area_size(46)
        .y_label_area_size(66)
        .build_cartesian_2d(x, y)
        .map_err(drawing)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 15).into_font().color(&INK))
        .x_desc(&axes.x_label)
        .y_desc(&axes.y_label)
        .draw()
        .map_err(drawing)?;
    Ok(chart)
}

fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, series: &[Series]) -> Result<()> {
    if series.iter().all(|one| one.name.is_empty()) {
        return Ok(());
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(FAINT)
        .label_font(("sans-serif", 13).into_font().color(&INK))
        .draw()
        .map_err(drawing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn svg(draw: impl Fn(&Path) -> Result<()>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.svg");
        draw(&path).unwrap();
        let first = std::fs::read_to_string(&path).unwrap();
        draw(&path).unwrap();
        assert_eq!(
            first,
            std::fs::read_to_string(&path).unwrap(),
            "the same bytes every time"
        );
        first
    }

    #[test]
    fn lines_have_texts_ticks_and_a_stroke_each() {
        let axes = Axes::new("Loss & more", "step", "loss").log_y();
        let falling = (1..50)
            .map(|i| (f64::from(i), 1.0 / f64::from(i * i)))
            .collect();
        let broken = vec![
            (1.0, 0.5),
            (2.0, 0.0),
            (3.0, f64::NAN),
            (4.0, 0.1),
            (5.0, 0.1),
        ];
        let series = [Series::new("ours", falling), Series::new("theirs", broken)];
        let text = svg(|path| line_plot(path, &axes, &series));
        for part in [
            "<svg",
            "Loss &amp; more",
            "step",
            "ours",
            "theirs",
            "0.001",
            "</svg>",
        ] {
            assert!(text.contains(part), "{part}");
        }
        // One line for the first series, one for the second's only run of two points.
        for color in ["#0072B2", "#D55E00"] {
            assert!(text.contains(color), "{color}");
        }
        assert!(!text.contains("NaN") && !text.contains("inf"));
    }

    #[test]
    fn scatter_draws_a_dot_a_point() {
        let points = (0..40).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        let series = [Series::new("", points)];
        let text = svg(|path| scatter(path, &Axes::default(), &series));
        assert_eq!(text.matches("<circle").count(), 40);
    }

    #[test]
    fn trajectories_share_colour_and_legend_by_name() {
        let path_of = |k: i32| (0..9).map(|t| (f64::from(t), f64::from(k * t))).collect();
        let series: Vec<Series> = (0..5)
            .map(|k| Series::new(if k < 3 { "a" } else { "b" }, path_of(k)))
            .collect();
        let text = svg(|path| trajectories(path, &Axes::new("t", "x", "y"), &series));
        assert_eq!(text.matches("<circle").count(), 5);
        assert_eq!(text.matches("opacity=\"0.4\"").count(), 5);
    }

    #[test]
    fn histogram_areas_sum_to_one() {
        let values: Vec<f64> = (0..1000).map(|i| f64::from(i % 37)).collect();
        let bars = density(&values, 8);
        let area: f64 = bars.iter().map(|(low, high, h)| (high - low) * h).sum();
        assert!((area - 1.0).abs() < 1e-12);
        assert_eq!((bars[0].0, bars[7].1), (0.0, 36.0));
        let curve = [Series::new("density", vec![(0.0, 0.03), (36.0, 0.03)])];
        let axes = Axes::new("h", "x", "density");
        let text = svg(|path| histogram(path, &axes, &values, 8, &curve));
        assert!(text.matches("<rect").count() >= 9);
    }

    #[test]
    fn nothing_to_show_is_an_error() {
        let path = Path::new("never-written.svg");
        let axes = Axes::new("", "", "loss").log_y();
        let series = [Series::new("", vec![(1.0, -1.0)])];
        assert!(line_plot(path, &axes, &[]).is_err());
        assert!(line_plot(path, &axes, &series).is_err());
        assert!(histogram(path, &Axes::default(), &[f64::NAN], 3, &[]).is_err());
        assert!(histogram(path, &Axes::default(), &[1.0], 0, &[]).is_err());
        assert!(!path.exists());
    }
}
