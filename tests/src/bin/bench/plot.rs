//! The figures as a picture: for each kind of work how many times its native time it takes, in mvm and in QEMU, on a logarithmic scale.

use std::fmt::Write;

use serde_json::{Map, Value};

/// What the figures keep for it, besides the programs.
pub const CLASSES: &str = "classes";

const WIDTH: f64 = 760.0;
/// Where the scale begins; the names are to the left of it.
const LEFT: f64 = 250.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 56.0;
const LINE: f64 = 19.0;
/// The scale: from the host's own speed to a thousand times slower.
const LEAST: f64 = 0.5;
const MOST: f64 = 1000.0;

/// One line of the picture: multiples of the native time.
struct Line<'a> {
    name: &'a str,
    mvm: Option<f64>,
    tcg: Option<f64>,
}

fn x_of(ratio: f64) -> f64 {
    let share = (ratio.clamp(LEAST, MOST) / LEAST).ln() / (MOST / LEAST).ln();
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws what `figures` has of classes and programs, as SVG.
#[allow(clippy::cast_precision_loss)]
pub fn draw(figures: &Map<String, Value>) -> String {
    let classes = figures.get(CLASSES).and_then(Value::as_array).into_iter().flatten();
    let programs = figures.get(crate::PROGRAMS).and_then(Value::as_object).into_iter().flatten();
    let line = |name, of: &Value| Line { name, mvm: of["mvm"].as_f64(), tcg: of["tcg"].as_f64() };
    let kinds = classes.map(|c| line(c["name"].as_str().map_or("", short), c)).collect();
    let programs: Vec<Line<'_>> = programs.map(|(name, of)| line(name, of)).collect();
    let parts: [(&str, Vec<Line<'_>>); 2] =
        [("instructions and the kernel", kinds), ("real programs", programs)];

    let mut body = String::new();
    let mut y = TOP;
    for (title, lines) in &parts {
        if lines.is_empty() {
            continue;
        }
        let _ = writeln!(body, r#"<text class="title" x="8" y="{:.0}">{title}</text>"#, y + 4.0);
        y += LINE;
        for line in lines {
            draw_line(&mut body, y, line);
            y += LINE;
        }
        y += LINE / 2.0;
    }
    let mut picture = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">
<title>Times of native, in mvm and in QEMU TCG</title>
<style>text {{ fill: #7d8590 }} .title {{ font-weight: bold }} .mvm {{ fill: #2f81f7 }} .tcg {{ fill: #d9822b }} line {{ stroke: #7d8590; stroke-opacity: .35 }} .gain {{ stroke-width: 3; stroke-opacity: .5 }}</style>
<circle class="mvm" cx="{LEFT}" cy="16" r="5"/><text x="{}" y="20">mvm emu</text>
<circle class="tcg" cx="{}" cy="16" r="5"/><text x="{}" y="20">QEMU TCG; times of native, logarithmic</text>
"#,
        LEFT + 10.0,
        LEFT + 90.0,
        LEFT + 100.0,
        height = y,
    );
    for tick in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0] {
        let x = x_of(tick);
        let _ = writeln!(
            picture,
            r#"<line x1="{x:.1}" x2="{x:.1}" y1="46" y2="{y:.0}"/><text x="{x:.1}" y="40" text-anchor="middle">{tick}x</text>"#
        );
    }
    picture + &body + "</svg>\n"
}

/// A name without what the picture has no room for.
fn short(name: &str) -> &str {
    if name.len() > 40 { "system calls, faults, files, signals" } else { name }
}

fn draw_line(body: &mut String, y: f64, line: &Line<'_>) {
    let _ = writeln!(
        body,
        r#"<text x="{:.0}" y="{:.0}" text-anchor="end">{}</text>"#,
        LEFT - 12.0,
        y + 4.0,
        escape(line.name)
    );
    if let (Some(mvm), Some(tcg)) = (line.mvm, line.tcg) {
        let (from, to) = (x_of(mvm), x_of(tcg));
        let _ = writeln!(
            body,
            r#"<line class="gain" x1="{from:.1}" x2="{to:.1}" y1="{y:.1}" y2="{y:.1}"/>"#
        );
    }
    for (class, ratio) in [("tcg", line.tcg), ("mvm", line.mvm)] {
        let Some(ratio) = ratio else { continue };
        let _ = writeln!(
            body,
            r#"<circle class="{class}" cx="{:.1}" cy="{y:.1}" r="5"><title>{}: {ratio:.1}x</title></circle>"#,
            x_of(ratio),
            escape(line.name)
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_and_scale() {
        let figures = json!({
            "classes": [{ "name": "a < b", "mvm": 1.0, "tcg": 10.0 }, { "name": "alone", "mvm": 5000.0, "tcg": null }],
            "programs": { "git-gc": { "mvm": 2.0, "tcg": 20.0 } },
        });
        let picture = draw(figures.as_object().expect("an object"));
        assert!(picture.contains("a &lt; b") && picture.contains("git-gc"), "{picture}");
        assert_eq!(picture.matches(r#"class="mvm""#).count(), 4, "{picture}");
        assert_eq!(picture.matches(r#"class="tcg""#).count(), 3, "{picture}");
        // Beyond the scale is at its end.
        assert!(picture.contains(r#"cx="740.0""#), "{picture}");
        assert!((x_of(1.0) - x_of(LEAST)) < (x_of(10.0) - x_of(1.0)));
    }
}
