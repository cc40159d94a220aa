//! Names of the files of a split model: `NAME-00001-of-00003.gguf`.

/// Most files of one model. The largest known one has about 50; each takes a file descriptor, of which a process often
/// has only 1024.
pub const MAX_PARTS: u32 = 512;

/// The name of one file of several, or its path or URL without a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitName<'a> {
    /// What stands before the numbers.
    pub prefix: &'a str,
    /// Which file it is, from 1.
    pub no: u32,
    /// How many there are, from 2 to [`MAX_PARTS`].
    pub count: u32,
}

impl<'a> SplitName<'a> {
    /// Takes a name apart; `None` for the only file of a model.
    pub fn parse(name: &'a str) -> Option<Self> {
        let number = |text: &str| {
            let is_number = text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| text.parse::<u32>().ok()).flatten()
        };
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, no) = rest.rsplit_once('-')?;
        let (no, count) = (number(no)?, number(count)?);
        let is_sound = (2..=MAX_PARTS).contains(&count) && (1..=count).contains(&no);
        is_sound.then_some(Self { prefix, no, count })
    }

    /// The names of all files, in their order.
    pub fn all(self) -> impl Iterator<Item = String> {
        (1..=self.count).map(move |no| format!("{}-{no:05}-of-{:05}.gguf", self.prefix, self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let split = SplitName::parse("a/m-00002-of-00003.gguf").unwrap();
        assert_eq!((split.prefix, split.no, split.count), ("a/m", 2, 3));
        assert_eq!(split.all().last().as_deref(), Some("a/m-00003-of-00003.gguf"));
        for other in [
            "m.gguf",
            "m-00001-of-00001.gguf",
            "m-00004-of-00003.gguf",
            "m-00000-of-00003.gguf",
            "m-+0001-of-00003.gguf",
            "m-00001-of-99999.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-00003.bin",
        ] {
            assert_eq!(SplitName::parse(other), None, "{other}");
        }
    }
}
