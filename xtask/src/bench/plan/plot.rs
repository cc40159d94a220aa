//! Predicted against measured, as SVG: one panel for each quantity, both axes logarithmic and alike, a line where
//! predictions are right, and a band as wide as most of them may be off.

use std::fmt::Write;

use super::report::{MEDIAN_OFF, WORST_OFF};
use crate::bench::serve::plot::{Axis, Scale, mark, number, text};

/// Clusters, as points of one quantity.
#[derive(Debug, Clone)]
pub struct Scatter {
    /// Stands above it, with the unit.
    pub title: String,
    /// Predicted and measured.
    pub points: Vec<(f64, f64)>,
}

/// Size of a panel; all lengths are in pixels.
const PANEL: (f64, f64) = (340.0, 360.0);

/// Where points lie in a panel: left, top, right, bottom.
const AREA: (f64, f64, f64, f64) = (58.0, 36.0, 324.0, 302.0);

/// Draws all panels in a row.
pub fn draw(scatters: &[Scatter]) -> String {
    let (width, height) = (PANEL.0 * scatters.len().max(1) as f64, PANEL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"system-ui, sans-serif\" font-size=\"12\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    for (k, scatter) in scatters.iter().enumerate() {
        // Writing into a string cannot fail.
        let _ = writeln!(svg, "<g transform=\"translate({} 0)\">\n{}</g>", PANEL.0 * k as f64, panel(k, scatter));
    }
    svg + "</svg>\n"
}

fn panel(k: usize, scatter: &Scatter) -> String {
    let (left, top, right, bottom) = AREA;
    let mut svg = text(left, top - 14.0, "start", &scatter.title);
    let is_drawn = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite() && *x > 0.0 && *y > 0.0;
    let points: Vec<&(f64, f64)> = scatter.points.iter().filter(is_drawn).collect();
    if points.is_empty() {
        return svg + &text(f64::midpoint(left, right), f64::midpoint(top, bottom), "middle", "not measured");
    }
    let all = || points.iter().flat_map(|(x, y)| [*x, *y]);
    let (x_axis, y_axis) =
        (Axis::of_values(Scale::Log, all(), (left, right)), Axis::of_values(Scale::Log, all(), (bottom, top)));
    let (low, high) = (x_axis.ticks[0], x_axis.ticks[x_axis.ticks.len() - 1]);
    let _ = writeln!(svg, "<clipPath id=\"area{k}\"><path d=\"M{left} {top}H{right}V{bottom}H{left}z\"/></clipPath>");
    for (off, colour) in [(WORST_OFF, "#f1f5f9"), (MEDIAN_OFF, "#dbe6f0")] {
        // Predicted may be so much more or less than measured.
        let corners = [(low, 1.0 - off), (high, 1.0 - off), (high, 1.0 + off), (low, 1.0 + off)];
        let corner =
            |(measured, share): (f64, f64)| format!("{:.1},{:.1}", x_axis.at(measured * share), y_axis.at(measured));
        let corners = corners.map(corner).join(" ");
        let _ = writeln!(svg, "<polygon points=\"{corners}\" fill=\"{colour}\" clip-path=\"url(#area{k})\"/>");
    }
    for tick in &x_axis.ticks {
        let (x, y) = (x_axis.at(*tick), y_axis.at(*tick));
        let _ = writeln!(svg, "<path d=\"M{x:.1} {bottom}v5M{left} {y:.1}h-5\" stroke=\"#888\"/>");
        svg += &text(x, bottom + 18.0, "middle", &number(*tick));
        svg += &text(left - 8.0, y + 4.0, "end", &number(*tick));
    }
    let _ = writeln!(svg, "<path d=\"M{left} {bottom}L{right} {top}\" stroke=\"#888\"/>");
    let _ = writeln!(svg, "<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>");
    svg += &text(f64::midpoint(left, right), bottom + 38.0, "middle", "predicted");
    let middle = f64::midpoint(top, bottom);
    let _ = writeln!(
        svg,
        "<g transform=\"translate(14 {middle}) rotate(-90)\">{}</g>",
        text(0.0, 0.0, "middle", "measured")
    );
    svg.extend(points.iter().map(|(x, y)| mark(0, x_axis.at(*x), y_axis.at(*y))));
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_where_they_were_measured_and_nonsense_is_left_out() {
        let points = vec![(10.0, 10.0), (20.0, 25.0), (0.0, 3.0), (f64::NAN, 1.0)];
        let svg = draw(&[
            Scatter { title: "one stream, tokens/s".to_owned(), points },
            Scatter { title: "first token, s".to_owned(), points: Vec::new() },
        ]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("not measured") && !svg.contains("NaN"));
        assert_eq!(svg.matches("<g").count(), svg.matches("</g>").count());
        // Right predictions lie on the line from one corner to the other.
        let (x, y) = (Axis::of_values(Scale::Log, [10.0, 25.0].into_iter(), (0.0, 1.0)), 10.0);
        assert!((x.at(y) - 0.0).abs() < 1e-9);
    }
}
