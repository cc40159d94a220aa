//! What power costs: for a million tokens, here and elsewhere.

use brigade_plan::{Forecast, figure};
use serde::Serialize;

/// What answering costs while machines do nothing else.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Of all machines of the plan, at full power.
    pub watts: f64,
    /// Of a kilowatt-hour, in US dollars.
    pub price_kwh: f64,
    /// Of a million tokens to a lone stream, in US dollars.
    pub usd_per_million_tokens: f64,
    /// The same with all streams.
    pub streams_usd_per_million_tokens: f64,
    /// Streams at once.
    pub streams: u32,
    /// What a million tokens cost elsewhere, in US dollars.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cloud_usd_per_million_tokens: Option<f64>,
}

/// Watt-seconds of a kilowatt-hour.
const JOULES_PER_KWH: f64 = 3.6e6;

impl Cost {
    /// For a plan whose machines take `watts` while they compute.
    pub fn of(watts: f64, forecast: &Forecast, price_kwh: f64, cloud: Option<f64>) -> Self {
        let usd = |tokens_per_s: f64| watts * 1e6 / tokens_per_s / JOULES_PER_KWH * price_kwh;
        Self {
            watts,
            price_kwh,
            usd_per_million_tokens: usd(forecast.tokens_per_s),
            streams_usd_per_million_tokens: usd(forecast.streams_tokens_per_s),
            streams: forecast.streams,
            cloud_usd_per_million_tokens: cloud,
        }
    }

    /// The same for people.
    pub fn lines(&self) -> Vec<String> {
        let (one, many) = (figure(self.usd_per_million_tokens), figure(self.streams_usd_per_million_tokens));
        let mut lines = vec![match self.streams {
            1 => format!("{} W at most: a million tokens take {one} USD of it", figure(self.watts)),
            n => format!(
                "{} W at most: a million tokens take {one} USD of it for one stream, {many} for {n}",
                figure(self.watts)
            ),
        }];
        if let Some(cloud) = self.cloud_usd_per_million_tokens {
            let own = self.streams_usd_per_million_tokens;
            let verdict = if own < cloud { "power here is cheaper" } else { "that is cheaper than the power alone" };
            lines.push(format!("a million tokens cost {} USD elsewhere: {verdict}", figure(cloud)));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kilowatt_for_an_hour_is_a_kilowatt_hour() {
        // A million tokens in 1000 s.
        let forecast = Forecast { tokens_per_s: 1000.0, streams: 8, streams_tokens_per_s: 4000.0, first_token_s: 1.0 };
        let cost = Cost::of(3600.0, &forecast, 0.5, Some(0.2));
        assert!((cost.usd_per_million_tokens - 0.5).abs() < 1e-12);
        assert!((cost.streams_usd_per_million_tokens - 0.125).abs() < 1e-12);
        assert!(cost.lines()[1].contains("0.20 USD elsewhere: power here is cheaper"), "{:?}", cost.lines());
        assert!(Cost::of(3600.0, &forecast, 0.5, Some(0.1)).lines()[1].contains("cheaper than the power"));
    }
}
