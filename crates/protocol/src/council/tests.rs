//! Each rule of the council, by itself.
