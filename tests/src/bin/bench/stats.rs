//! Medians and means.

/// The median of `values`; NaN if there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The geometric mean of positive `values`; NaN if there is none.
#[allow(clippy::cast_precision_loss)]
pub fn geomean(values: &[f64]) -> f64 {
    (values.iter().map(|v| v.ln()).sum::<f64>() / values.len() as f64).exp()
}

/// A multiple, with as many digits as say something.
pub fn times(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value < 0.095 => format!("{value:.2}x"),
        Some(value) if value < 9.95 => format!("{value:.1}x"),
        Some(value) => format!("{value:.0}x"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn middle_and_mean() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-12);
        assert!((geomean(&[1.0, 4.0]) - 2.0).abs() < 1e-12);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn multiples() {
        let texts = [Some(0.031), Some(0.1), Some(9.9), Some(9.96), Some(1294.8), None].map(times);
        assert_eq!(texts, ["0.03x", "0.1x", "9.9x", "10x", "1295x", "-"]);
    }
}
