//! A cluster file is read, and what is wrong in it is said.

use super::super::models::{self, Quant};
use super::*;

const HOME: &str = r#"
    [prices]
    kwh_usd = 0.30

    [[node]]
    name = "desk"
    device = "RTX 3090"
    link = "2.5gbe"
    coordinator = true

    [[node]]
    name = "mini"
    count = 2
    kind = "cpu"
    bandwidth_gb_s = 51.2
    tflops = 0.9
    memory = "24GiB"
    throttle = 0.5
    watts = 30

    [[pair]]
    between = ["mini", "mini"]
    latency_ms = 0.1
    gbit_s = 8
"#;

fn error(text: &str) -> ScenarioError {
    Scenario::parse(text).unwrap_err()
}

#[test]
fn a_home_is_read() {
    let home = Scenario::parse(HOME).unwrap();
    assert_eq!(home.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["desk", "mini-1", "mini-2"]);
    assert_eq!((home.coordinator, home.prices.kwh_usd), (Some(0), Some(0.30)));
    assert_eq!(home.nodes[0].memory, home.nodes[0].device.usable(ByteSize::gib(24)));
    assert!((22..24).contains(&(home.nodes[0].memory.0 >> 30)));
    assert_eq!((home.nodes[0].watts, home.nodes[1].watts), (Some(350.0), Some(30.0)));
    let model = models::profile("llama-3.1-8b", Quant::Q4_K_M).unwrap();
    let profiles = home.profiles(&model);
    assert_eq!(profiles.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["mini-1", "mini-2", "desk"]);
    let full = home.nodes[1].device.speed(&model).decode.at(1.0);
    assert_eq!(profiles[0].speed.as_ref().unwrap().decode.at(1.0), 2.0 * full);
}

#[test]
fn links_are_of_pairs_else_of_both_ends() {
    let home = Scenario::parse(HOME).unwrap();
    let (links, id) = (home.links(), |k: usize| home.nodes[k].id);
    assert_eq!(links.get(id(1), id(2)), LinkProfile { latency_s: 0.0001, bytes_per_s: 1e9 });
    // The desk is attached with 2.5 gigabit, the mini by the default of one.
    let mixed = links.get(id(0), id(1));
    assert!((mixed.latency_s - 0.000_275).abs() < 1e-9 && mixed.bytes_per_s == 117e6, "{mixed:?}");
    assert_eq!(home.node(id(2)).unwrap().name, "mini-2");
}

#[test]
fn what_is_far_or_in_the_air_is_paid_whole() {
    let node = |name: &str, link: &str| format!("[[node]]\nname='{name}'\ndevice='rtx-3090'\n{link}\n");
    let text = [
        node("cable", "link='1gbe'"),
        node("air", "link='wifi-6'"),
        node("attic", "link='wifi-6'"),
        node("far", "link='wan-30ms-100mbit'"),
        node("own", "latency_ms=4\ngbit_s=1"),
    ]
    .concat();
    let scenario = Scenario::parse(&text).unwrap();
    let (links, id) = (scenario.links(), |k: usize| scenario.nodes[k].id);
    let ms = |from: usize, to: usize| (links.get(id(from), id(to)).latency_s * 1e6).round() / 1e3;
    // Half a cable of 0.3 ms, and 2.5 ms through the air for each that is in it.
    assert_eq!([ms(0, 1), ms(1, 0), ms(1, 2)], [2.65, 2.65, 5.0]);
    assert_eq!([ms(0, 3), ms(1, 3), ms(0, 4)], [30.15, 32.5, 4.15]);
    assert_eq!(links.get(id(0), id(3)).bytes_per_s, 0.09e9 / 8.0);
    let pair = format!("{text}[[pair]]\nbetween=['air', 'attic']\nlink='wifi-7'");
    let scenario = Scenario::parse(&pair).unwrap();
    let direct = scenario.links().get(scenario.nodes[1].id, scenario.nodes[2].id);
    assert_eq!(direct, Catalogue::built_in().link("wifi-7").unwrap().profile);
}

#[test]
fn without_a_coordinator_the_fastest_is_last() {
    let text = "[[node]]\nname='a'\ndevice='rtx-4090'\n[[node]]\nname='b'\ndevice='raspberry-pi-5'";
    let model = models::profile("llama-3.1-8b", Quant::Q4_K_M).unwrap();
    let scenario = Scenario::parse(text).unwrap();
    assert_eq!((scenario.coordinator, scenario.profiles(&model)[1].name.as_str()), (None, "a"));
}

#[test]
fn errors_say_what_to_write() {
    let node = |rest: &str| format!("[[node]]\nname='a'\n{rest}\n");
    let good = node("device='rtx-3090'");
    for (text, hint) in [
        (String::new(), "[[node]]"),
        (node(""), "device ="),
        (node("device='rtx-3091'"), "rtx-3090"),
        (node("device='rtx-3090'\nlink='1gbit'"), "1gbe"),
        (node("device='rtx-3090'\nmemory='lots'"), "24GiB"),
        (node("device='rtx-3090'\nthrottle=0"), "above 0"),
        (node("device='rtx-3090'\nwatts=nan"), "0 or more"),
        (node("device='rtx-3090'\ncount=0"), "1 or more"),
        (node("device='rtx-3090'\nlatency_ms=3"), "gbit_s"),
        (node("kind='cpu'\nbandwidth_gb_s=50\ntflops=1"), "memory ="),
        (node("kind='cpu'\nbandwidth_gb_s=-1\ntflops=1\nmemory='1GiB'"), "above 0"),
        (node("device='rtx-3090'\ncolour='red'"), "colour"),
        (format!("{good}{good}"), "different names"),
        (node("device='rtx-3090'\ncount=2\ncoordinator=true"), "without count"),
        (format!("{}{good}", node("device='rtx-3090'\ncount=2")), "different names"),
        (format!("{good}{}", node("device='rtx-3090'\ncount=2")), "different names"),
        (format!("{}[[node]]\nname='a-1'\ndevice='rtx-3090'", node("device='rtx-3090'\ncount=2")), "different names"),
        (format!("[[node]]\nname='a-1'\ndevice='rtx-3090'\ncount=1\n{}", node("device='rtx-3090'\ncount=1")), "names"),
        ("[[node]]\nname=''\ndevice='rtx-3090'".to_owned(), "printable"),
        ("[[node]]\nname=''\ncount=2\ndevice='rtx-3090'".to_owned(), "printable"),
        ("[[node]]\nname=\"a\\tb\"\ndevice='rtx-3090'".to_owned(), "printable"),
        (format!("[[node]]\nname='{}'\ncount=2\ndevice='rtx-3090'", "a".repeat(63)), "1 to 64"),
        (node("device='rtx-3090'\nlatency_ms=1\ngbit_s=inf"), "at most 8000000"),
        (node("device='rtx-3090'\nlatency_ms=inf\ngbit_s=1"), "at most 3600000"),
        (node("device='rtx-3090'\nwatts=1e308"), "at most 1000000"),
        (node("kind='cpu'\nbandwidth_gb_s=inf\ntflops=1\nmemory='1GiB'"), "at most 1000000"),
        (node("kind='cpu'\nbandwidth_gb_s=1\ntflops=1e300\nmemory='1GiB'"), "at most 10000000"),
        ("[prices]\nkwh_usd=1e300".to_owned(), "at most 1000000"),
        (format!("{good}[[pair]]\nbetween=['a','b']\nlink='1gbe'"), "no node is called so"),
        (format!("{good}[[pair]]\nbetween=['a','a']\nlink='1gbe'"), "itself"),
        (format!("{good}[[pair]]\nbetween=['a','a']"), "latency_ms"),
        ("[prices]\nkwh_usd=-1".to_owned(), "kwh_usd"),
        ("[[node]".to_owned(), "line 1"),
    ] {
        let message = error(&text).to_string();
        assert!(message.contains(hint), "{text}: {message}");
    }
}

#[test]
fn sizes_are_capped() {
    assert!(matches!(error(&" ".repeat(MAX_FILE_BYTES + 1)), ScenarioError::TooLarge { .. }));
    let many = |n: u32| format!("[[node]]\nname='a'\ndevice='rtx-3090'\ncount={n}\n");
    assert_eq!(Scenario::parse(&many(10_000)).unwrap().nodes.len(), MAX_NODES);
    assert!(matches!(error(&many(10_001)), ScenarioError::TooManyNodes { n_nodes: 10_001 }));
    assert!(matches!(error(&many(u32::MAX)), ScenarioError::TooManyNodes { .. }));
    let pairs = format!("{}[[pair]]\nbetween=['a','a']\nlink='10gbe'", many(10_000));
    assert_eq!(error(&pairs), ScenarioError::TooManyPairs);
}
