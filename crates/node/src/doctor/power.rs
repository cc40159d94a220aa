//! Power and heat: what makes a processor slow down, or a machine go to sleep.

use brigade_protocol::measure::Finding;

use super::machine::Machine;
use super::{ok, warn};
use crate::system;

/// Most processors that are looked at: those of one machine are governed alike, up to two kinds.
const MAX_CPUS: usize = 64;

const CPU_DIR: &str = "sys/devices/system/cpu";

/// What is known of a machine's power.
#[derive(Debug, Clone, Default)]
pub(super) struct Power {
    /// Who chooses the clock, of each processor once: driver, governor and its preference, where there are such.
    governors: Vec<Governor>,
    /// Clock of the fastest processor now and at most, in kHz.
    clock: Option<(u64, u64)>,
    /// The firmware's choice between quiet and fast.
    profile: Option<String>,
    /// How often heat slowed processors down, since the start and while it was watched.
    throttled: Option<(u64, u64)>,
    /// Processors are cooled by slowing them down at this moment.
    is_cooled: bool,
    battery: Battery,
    /// Why the machine may go to sleep; empty if nothing was found.
    sleeps: Vec<String>,
}

/// What feeds the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Battery {
    #[default]
    None,
    Charged,
    Drawn,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Governor {
    driver: String,
    name: String,
    preference: String,
}

/// How often heat slowed processors down since the start; `None` where nobody counts.
pub(super) fn throttle_count(machine: &Machine) -> Option<u64> {
    system::thermal_throttles(&machine.path(CPU_DIR))
}

fn cpus(machine: &Machine) -> impl Iterator<Item = String> {
    let is_cpu = |name: &String| name.len() > 3 && name[3..].bytes().all(|byte| byte.is_ascii_digit());
    machine.names(CPU_DIR, "cpu").into_iter().filter(is_cpu).take(MAX_CPUS)
}

impl Power {
    /// Looks at power as it is, and at how often heat slowed processors down since `throttled` was counted.
    pub(super) fn gather(machine: &Machine, throttled: Option<u64>) -> Self {
        let now = throttle_count(machine);
        let of = |cpu: &str, file: &str| machine.text(format!("{CPU_DIR}/{cpu}/cpufreq/{file}")).unwrap_or_default();
        let mut governors: Vec<Governor> = Vec::new();
        let mut clock: Option<(u64, u64)> = None;
        for cpu in cpus(machine) {
            let governor = Governor {
                driver: of(&cpu, "scaling_driver"),
                name: of(&cpu, "scaling_governor"),
                preference: of(&cpu, "energy_performance_preference"),
            };
            if !governor.name.is_empty() && !governors.contains(&governor) {
                governors.push(governor);
            }
            let khz = |file| of(&cpu, file).parse::<u64>().ok();
            let this = khz("scaling_cur_freq").zip(khz("cpuinfo_max_freq"));
            clock = clock.into_iter().chain(this).max();
        }
        Self {
            governors,
            clock,
            profile: machine.text("sys/firmware/acpi/platform_profile"),
            throttled: now.map(|now| (now, now.saturating_sub(throttled.unwrap_or(now)))),
            is_cooled: is_cooled(machine),
            battery: battery(machine),
            sleeps: sleeps(machine),
        }
    }

    /// What follows from that.
    pub(super) fn judge(&self) -> Vec<Finding> {
        let mut findings = vec![self.judge_heat()];
        findings.extend(self.judge_saving());
        findings.extend(self.judge_sleep());
        findings
    }

    fn clock_text(&self) -> String {
        let ghz = |khz: u64| khz as f64 / 1e6;
        let text = |(now, most)| format!("{:.1} of {:.1} GHz at this moment", ghz(now), ghz(most));
        self.clock.map(text).unwrap_or_default()
    }

    fn judge_saving(&self) -> Option<Finding> {
        let fix = "sudo cpupower frequency-set -g performance, or the power profile `performance`";
        let cost = match self.clock {
            Some(_) => format!("the clock is at {}", self.clock_text()),
            None => "not measured".to_owned(),
        };
        if let Some(governor) = self.governors.iter().find(|governor| governor.saves()) {
            let preference =
                if governor.preference.is_empty() { String::new() } else { format!(", {}", governor.preference) };
            let detail = format!("processors save power ({}{preference})", governor.name);
            return Some(warn("power saving", detail, cost, fix));
        }
        if let Some(profile) =
            self.profile.as_deref().filter(|profile| ["low-power", "quiet", "cool"].contains(profile))
        {
            return Some(warn("power saving", format!("the firmware's profile is {profile}"), cost, fix));
        }
        let governor = self.governors.first()?;
        Some(ok("power saving", format!("{}; {}", governor.name, self.clock_text())))
    }

    fn judge_heat(&self) -> Finding {
        let fix = "clean its fans, give it air, or raise its power limit; fewer --threads make less heat";
        let (since_start, now) = self.throttled.unwrap_or_default();
        if now > 0 || self.is_cooled {
            let cost = match self.clock {
                Some(_) => format!("the clock is at {}", self.clock_text()),
                None => "a lower clock; not measured".to_owned(),
            };
            return warn("heat", "processors are slowed down because they are hot", cost, fix);
        }
        match self.throttled {
            Some(_) if since_start > 0 => {
                ok("heat", format!("not slowed down now; it was so {since_start} times since the start"))
            }
            Some(_) => ok("heat", "never slowed down since the start"),
            None => ok("heat", "not slowed down, as far as the system tells"),
        }
    }

    fn judge_sleep(&self) -> Option<Finding> {
        if self.battery == Battery::Drawn {
            let cost = "lower clocks, and the node is lost when the battery is empty";
            return Some(warn("power supply", "this machine runs on its battery", cost, "plug it in"));
        }
        if !self.sleeps.is_empty() {
            let cost = "the cluster loses this node each time: answers pause until its layers are elsewhere";
            let fix = "sudo systemctl mask sleep.target suspend.target, or turn sleep off in the desktop's settings";
            return Some(warn("sleep", self.sleeps.join("; "), cost, fix));
        }
        (self.battery == Battery::Charged).then(|| {
            ok("power supply", "plugged in; it has a battery, so see that closing the lid does not send it to sleep")
        })
    }
}

impl Governor {
    /// Whether it holds the clock down. With drivers that leave the choice to the processor, `powersave` is the usual
    /// name for following the load, and the preference says how eagerly.
    fn saves(&self) -> bool {
        let leaves_it = ["intel_pstate", "amd-pstate-epp", "amd_pstate_epp"].contains(&self.driver.as_str());
        let is_thrifty = ["power", "balance_power"].contains(&self.preference.as_str());
        (self.name == "powersave" && !leaves_it) || is_thrifty
    }
}

/// Whether a processor is slowed down to cool it, on machines that count nothing: small boards.
fn is_cooled(machine: &Machine) -> bool {
    let dir = "sys/class/thermal";
    machine.names(dir, "cooling_device").iter().any(|device| {
        let kind = machine.text(format!("{dir}/{device}/type")).unwrap_or_default().to_lowercase();
        let is_processor = ["cpufreq", "cpu-freq", "processor"].iter().any(|name| kind.contains(name));
        is_processor && machine.number::<u64>(format!("{dir}/{device}/cur_state")).is_some_and(|state| state > 0)
    })
}

fn battery(machine: &Machine) -> Battery {
    match system::battery(&machine.path("sys/class/power_supply")).0 {
        Some(true) => Battery::Drawn,
        Some(false) => Battery::Charged,
        None => Battery::None,
    }
}

/// Reasons for which the machine goes to sleep by itself.
fn sleeps(machine: &Machine) -> Vec<String> {
    let units = "etc/systemd/system";
    let is_masked = |unit: &str| {
        std::fs::read_link(machine.path(units).join(unit)).is_ok_and(|target| target.as_os_str() == "/dev/null")
    };
    if is_masked("sleep.target") || is_masked("suspend.target") {
        return Vec::new();
    }
    let mut reasons = Vec::new();
    let parts = machine.names("etc/systemd/logind.conf.d", "").into_iter();
    let parts = parts.map(|name| format!("etc/systemd/logind.conf.d/{name}"));
    let texts =
        std::iter::once("etc/systemd/logind.conf".to_owned()).chain(parts).filter_map(|path| machine.text(path));
    let idle = texts.filter_map(|text| last_setting(&text, "IdleAction=")).next_back();
    if let Some(action) = idle.filter(|action| !["", "ignore", "lock"].contains(&action.as_str())) {
        reasons.push(format!("systemd's IdleAction is {action}"));
    }
    let desktop = "org.gnome.settings-daemon.plugins.power";
    let ask = |key| machine.ask("gsettings", &["get", desktop, key]).map(|text| text.trim().to_owned());
    if ask("sleep-inactive-ac-type").is_some_and(|kind| kind == "'suspend'" || kind == "'hibernate'") {
        let after = ask("sleep-inactive-ac-timeout").filter(|seconds| seconds != "0");
        reasons.extend(after.map(|seconds| format!("the desktop sends it to sleep after {seconds} idle seconds")));
    }
    reasons
}

fn last_setting(text: &str, key: &str) -> Option<String> {
    text.lines().filter_map(|line| line.trim().strip_prefix(key)).next_back().map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::trouble;
    use super::*;

    fn governor(driver: &str, name: &str, preference: &str) -> Governor {
        Governor { driver: driver.to_owned(), name: name.to_owned(), preference: preference.to_owned() }
    }

    #[track_caller]
    fn check(power: &Power, expected: &[&str]) {
        let findings = power.judge();
        let found: Vec<&str> = trouble(&findings).into_iter().map(|(check, _)| check).collect();
        assert_eq!(found, expected, "{findings:?}");
    }

    #[test]
    fn saving_is_told_from_following_the_load() {
        let with = |governor| Power { governors: vec![governor], ..Power::default() };
        check(&with(governor("acpi-cpufreq", "schedutil", "")), &[]);
        check(&with(governor("acpi-cpufreq", "powersave", "")), &["power saving"]);
        check(&with(governor("intel_pstate", "powersave", "balance_performance")), &[]);
        check(&with(governor("intel_pstate", "powersave", "balance_power")), &["power saving"]);
        check(&Power { profile: Some("low-power".to_owned()), ..Power::default() }, &["power saving"]);
        check(&Power { profile: Some("performance".to_owned()), ..Power::default() }, &[]);
    }

    #[test]
    fn heat_counts_while_it_slows() {
        let with = |throttled| Power { throttled, clock: Some((1_200_000, 4_500_000)), ..Power::default() };
        check(&with(Some((40, 0))), &[]);
        check(&with(Some((40, 2))), &["heat"]);
        assert!(with(Some((40, 2))).judge()[0].cost.contains("1.2 of 4.5 GHz"));
        check(&Power { is_cooled: true, ..Power::default() }, &["heat"]);
    }

    #[test]
    fn machines_that_sleep_or_run_dry_are_found() {
        check(&Power { battery: Battery::Charged, ..Power::default() }, &[]);
        check(&Power { battery: Battery::Drawn, ..Power::default() }, &["power supply"]);
        check(&Power { sleeps: vec!["x".to_owned()], ..Power::default() }, &["sleep"]);
    }

    #[test]
    fn a_machine_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave"),
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_driver", "acpi-cpufreq"),
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "800000"),
            ("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "3000000"),
            ("sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "5"),
            ("sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "2"),
            ("sys/devices/system/cpu/cpufreq/ignored", ""),
            ("sys/class/thermal/cooling_device0/type", "cpufreq-cpu0"),
            ("sys/class/thermal/cooling_device0/cur_state", "1"),
            ("sys/class/power_supply/mouse/type", "Battery"),
            ("sys/class/power_supply/mouse/scope", "Device"),
            ("sys/class/power_supply/mouse/status", "Discharging"),
            ("sys/class/power_supply/BAT0/type", "Battery"),
            ("sys/class/power_supply/BAT0/status", "Charging"),
            ("etc/systemd/logind.conf", "[Login]\n#IdleAction=hibernate\nIdleAction=ignore\n"),
            ("etc/systemd/logind.conf.d/x.conf", "[Login]\nIdleAction=suspend\n"),
        ];
        let machine = Machine::made_up(dir.path(), &files);
        let power = Power::gather(&machine, Some(4));
        assert_eq!(power.governors, [governor("acpi-cpufreq", "powersave", "")]);
        assert_eq!((power.clock, power.throttled), (Some((800_000, 3_000_000)), Some((7, 3))));
        assert_eq!((power.is_cooled, power.battery), (true, Battery::Charged));
        assert_eq!(power.sleeps, ["systemd's IdleAction is suspend"]);
        std::fs::create_dir_all(dir.path().join("etc/systemd/system")).unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.path().join("etc/systemd/system/sleep.target")).unwrap();
        assert!(sleeps(&machine).is_empty(), "what is masked does not happen");
    }
}
