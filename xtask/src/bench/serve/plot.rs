//! Curves as SVG: one panel for each plot, side by side in two columns, one legend for all.
//!
//! The axis of streams is logarithmic, since their numbers double; the other one as each plot wants it, from 0 where it
//! is linear. Ticks are at 1, 2 and 5 times powers of ten. The colours can be told apart by the colour-blind
//! (Okabe and Ito, 2008), and each series has a mark of its own. Its parts serve other drawings, too.

use std::fmt::Write;

/// How values are laid along the vertical axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// From 0; negative values are left out.
    Linear,
    /// From below the least value; 0 is left out, too.
    Log,
}

/// A curve.
#[derive(Debug, Clone)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Streams and value.
    pub points: Vec<(f64, f64)>,
}

/// A panel. All panels of a drawing have the same series in the same order.
#[derive(Debug, Clone)]
pub struct Plot {
    /// Stands above it, with the unit.
    pub title: String,
    /// The vertical axis.
    pub scale: Scale,
    /// The curves.
    pub series: Vec<Series>,
}

/// Blue, orange, green, purple.
const COLOURS: [&str; 4] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"];

/// Panels in a row.
const COLUMNS: usize = 2;

/// Size of a panel; all lengths are in pixels.
const PANEL: (f64, f64) = (460.0, 300.0);

/// Above all panels.
const LEGEND_HEIGHT: f64 = 44.0;

/// Where the curves of a panel lie in it: left, top, right, bottom. Around them is room for the title and the numbers.
const AREA: (f64, f64, f64, f64) = (64.0, 36.0, 444.0, 256.0);

/// Most ticks of an axis that stand apart at the size of the letters.
const MAX_TICKS: usize = 8;

/// Draws all panels.
pub fn draw(plots: &[Plot]) -> String {
    let n_columns = plots.len().clamp(1, COLUMNS);
    let (width, height) = (PANEL.0 * n_columns as f64, LEGEND_HEIGHT + PANEL.1 * plots.len().div_ceil(COLUMNS) as f64);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    let names = plots.first().map_or(&[][..], |plot| &plot.series);
    for (k, series) in names.iter().enumerate() {
        let x = 24.0 + 190.0 * k as f64;
        svg += &mark(k, x, 22.0);
        svg += &text(x + 12.0, 26.0, "start", &series.name);
    }
    for (k, plot) in plots.iter().enumerate() {
        let (x, y) = (PANEL.0 * (k % COLUMNS) as f64, LEGEND_HEIGHT + PANEL.1 * (k / COLUMNS) as f64);
        // Writing into a string cannot fail.
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">\n{}</g>", panel(plot));
    }
    svg + "</svg>\n"
}

fn panel(plot: &Plot) -> String {
    let (left, top, right, bottom) = AREA;
    let drawn = |series: &Series| -> Vec<(f64, f64)> {
        let least = if plot.scale == Scale::Log { f64::MIN_POSITIVE } else { 0.0 };
        let fits = |(x, y): &(f64, f64)| *x > 0.0 && y.is_finite() && *y >= least;
        series.points.iter().copied().filter(fits).collect()
    };
    let all: Vec<(f64, f64)> = plot.series.iter().flat_map(drawn).collect();
    let mut svg = text(left, top - 14.0, "start", &plot.title);
    if all.is_empty() {
        return svg + &text(f64::midpoint(left, right), f64::midpoint(top, bottom), "middle", "not measured");
    }
    let x_axis = Axis::of_streams(all.iter().map(|point| point.0), (left, right));
    let y_axis = Axis::of_values(plot.scale, all.iter().map(|point| point.1), (bottom, top));
    for tick in &y_axis.ticks {
        let y = y_axis.at(*tick);
        let _ = writeln!(svg, "<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>");
        svg += &text(left - 8.0, y + 4.0, "end", &number(*tick));
    }
    for tick in &x_axis.ticks {
        let x = x_axis.at(*tick);
        let _ = writeln!(svg, "<path d=\"M{x:.1} {bottom}v5\" stroke=\"#888\"/>");
        svg += &text(x, bottom + 18.0, "middle", &number(*tick));
    }
    let _ = writeln!(svg, "<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>");
    svg += &text(f64::midpoint(left, right), bottom + 36.0, "middle", "streams");
    for (k, series) in plot.series.iter().enumerate() {
        let at: Vec<(f64, f64)> = drawn(series).iter().map(|(x, y)| (x_axis.at(*x), y_axis.at(*y))).collect();
        let line: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let colour = COLOURS[k % COLOURS.len()];
        let line = line.join(" ");
        let _ = writeln!(svg, "<polyline points=\"{line}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
        svg.extend(at.iter().map(|(x, y)| mark(k, *x, *y)));
    }
    svg
}

/// Where values lie between two ends.
pub struct Axis {
    scale: Scale,
    /// The least and the greatest value.
    values: (f64, f64),
    /// Where these are drawn.
    ends: (f64, f64),
    /// Values that get a number.
    pub ticks: Vec<f64>,
}

impl Axis {
    /// The numbers of streams are the ticks.
    fn of_streams(streams: impl Iterator<Item = f64>, ends: (f64, f64)) -> Self {
        let mut ticks: Vec<f64> = streams.collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        // A single number would have no width.
        Self { scale: Scale::Log, values: (low, high.max(low * 2.0)), ends, ticks }
    }

    /// From 0 or the tick below the least, to the tick above the greatest.
    pub fn of_values(scale: Scale, values: impl Iterator<Item = f64>, ends: (f64, f64)) -> Self {
        let (low, high) = values.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), y| (low.min(y), high.max(y)));
        let ticks = match scale {
            Scale::Linear if high == 0.0 => linear_ticks(1.0),
            Scale::Linear => linear_ticks(high),
            Scale::Log => log_ticks(low, high),
        };
        Self { scale, values: (ticks[0], ticks[ticks.len() - 1]), ends, ticks }
    }

    /// Where a value is drawn.
    pub fn at(&self, value: f64) -> f64 {
        let (low, high) = self.values;
        let share = match self.scale {
            Scale::Linear => (value - low) / (high - low),
            Scale::Log => (value / low).ln() / (high / low).ln(),
        };
        self.ends.0 + share * (self.ends.1 - self.ends.0)
    }
}

/// Steps of 1, 2 or 5 times a power of ten from 0 to the first one that is not below `high`.
fn linear_ticks(high: f64) -> Vec<f64> {
    let least = high / (MAX_TICKS - 1) as f64;
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|step| *step >= least);
    let step = step.unwrap_or(10.0 * power);
    (0..=(high / step).ceil() as usize).map(|k| k as f64 * step).collect()
}

/// 1, 2 and 5 times powers of ten from the last one that is not above `low` to the first that is not below `high`; only
/// the powers themselves where that would be too many.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32 + 1;
    let candidates = |steps: &'static [f64]| -> Vec<f64> {
        let all: Vec<f64> = decades.clone().flat_map(|n| steps.iter().map(move |step| step * 10f64.powi(n))).collect();
        let from = all.iter().rposition(|tick| *tick <= low).unwrap_or(0);
        let to = all.iter().position(|tick| *tick >= high).unwrap_or(all.len() - 1).max(from + 1);
        all[from..=to].to_vec()
    };
    let fine = candidates(&[1.0, 2.0, 5.0]);
    if fine.len() <= MAX_TICKS { fine } else { candidates(&[1.0]) }
}

/// A tick's number without digits that say nothing.
pub fn number(value: f64) -> String {
    let rounded = format!("{value:.3}");
    rounded.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A mark of its own shape and colour for each series.
pub fn mark(series: usize, x: f64, y: f64) -> String {
    let colour = COLOURS[series % COLOURS.len()];
    let shape = match series % 3 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\""),
        1 => format!("<path d=\"M{x:.1} {:.1}l4.5 8h-9z\"", y - 5.0),
        _ => format!("<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\"", x - 3.5, y - 3.5),
    };
    format!("{shape} fill=\"{colour}\"/>\n")
}

/// A line of text.
pub fn text(x: f64, y: f64, anchor: &str, text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(scale: Scale, points: &[(f64, f64)]) -> Plot {
        let series = |name: &str| Series { name: name.to_owned(), points: points.to_vec() };
        Plot { title: "gap < 1 & \"quoted\"".to_owned(), scale, series: ["a", "<b>", "c & d"].map(series).to_vec() }
    }

    /// Checks that elements nest, attributes are quoted, and text is escaped; returns how many elements there are.
    fn check_xml(text: &str) -> usize {
        let (mut open, mut n_elements, mut rest) = (Vec::new(), 0, text);
        while let Some((before, behind)) = rest.split_once('<') {
            assert!(
                !before.contains('>')
                    && !before.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "").contains('&')
            );
            let (tag, after) = behind.split_once('>').expect("a tag ends");
            rest = after;
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
                continue;
            }
            assert!(
                tag.matches('"').count() % 2 == 0 && !tag.contains('&') && !tag.contains("NaN") && !tag.contains("inf")
            );
            n_elements += 1;
            if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().expect("a tag has a name"));
            }
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest:?}");
        n_elements
    }

    #[test]
    fn drawings_are_well_formed_whatever_is_drawn() {
        let curve = [(1.0, 10.0), (2.0, 18.0), (32.0, 55.5)];
        let odd = [(0.0, 3.0), (1.0, 0.0), (2.0, f64::NAN), (4.0, -3.0)];
        for scale in [Scale::Linear, Scale::Log] {
            for points in [&curve[..], &odd, &curve[..1], &[(8.0, 0.0)], &[]] {
                for n_plots in 0..4 {
                    check_xml(&draw(&vec![plot(scale, points); n_plots]));
                }
            }
        }
        let three = [plot(Scale::Linear, &curve)];
        assert_eq!(draw(&three).matches("<polyline").count(), 3);
        assert_eq!(draw(&three).matches("<circle").count(), 1 + curve.len());
        assert!(draw(&[plot(Scale::Log, &[(8.0, 0.0)])]).contains("not measured"));
    }

    #[test]
    fn axes_place_values_between_their_ends() {
        let streams = Axis::of_streams([1.0, 4.0, 2.0, 4.0].into_iter(), (0.0, 100.0));
        assert_eq!([1.0, 2.0, 4.0].map(|n| streams.at(n)), [0.0, 50.0, 100.0]);
        assert_eq!(streams.ticks, [1.0, 2.0, 4.0]);
        let alone = Axis::of_streams([8.0].into_iter(), (0.0, 100.0));
        assert_eq!(alone.at(8.0), 0.0);
        let values = Axis::of_values(Scale::Linear, [3.0, 47.0].into_iter(), (200.0, 0.0));
        assert_eq!(values.ticks, [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]);
        assert_eq!([values.at(0.0), values.at(25.0), values.at(50.0)], [200.0, 100.0, 0.0]);
    }

    #[test]
    fn ticks_enclose_what_is_drawn() {
        for high in [1e-9, 0.07, 1.0, 3.0, 7.0, 7.1, 999.0, 1e6] {
            let ticks = linear_ticks(high);
            assert!(ticks[ticks.len() - 1] >= high && (2..=MAX_TICKS + 1).contains(&ticks.len()), "{high}: {ticks:?}");
        }
        for (low, high) in [(3.0, 70.0), (5.0, 5.0), (0.02, 80_000.0), (100.0, 100.0), (999.0, 1001.0)] {
            let ticks = log_ticks(low, high);
            assert!(ticks[0] <= low && ticks[ticks.len() - 1] >= high && ticks.len() >= 2, "{low} {high}: {ticks:?}");
        }
        assert_eq!(log_ticks(3.0, 70.0), [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.05, 2.5, 1000.0].map(number), ["0", "0.05", "2.5", "1000"]);
    }
}
