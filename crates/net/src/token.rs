//! Random texts that only their bearers know.

use data_encoding::BASE32_NOPAD;
use ring::rand::{SecureRandom, SystemRandom};

/// Bytes of a token: 160 bits, a whole number of base32 digits.
const TOKEN_BYTES: usize = 20;

/// The system has no randomness to give.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct RandomError;

/// A token of 32 letters and digits that cannot be guessed.
///
/// # Errors
/// If the system has no randomness to give.
pub fn random_token() -> Result<String, RandomError> {
    let mut bytes = [0; TOKEN_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| RandomError)?;
    Ok(BASE32_NOPAD.encode(&bytes).to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_and_differ() {
        let (one, two) = (random_token().unwrap(), random_token().unwrap());
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }
}
