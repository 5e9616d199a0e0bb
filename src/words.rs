//! Enums whose variants each have a word: one table for the variants, their order and their words.

macro_rules! words {
    (
        $(#[$attribute:meta])* $name:ident, $(#[$doc:meta])* $word:ident:
        $($(#[$note:meta])* $variant:ident $text:literal,)+
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$note])* $variant),+
        }

        impl $name {
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$variant),+];

            $(#[$doc])*
            pub fn $word(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),+
                }
            }

            /// The one with this word.
            pub fn named(text: &str) -> Option<Self> {
                Self::ALL.into_iter().find(|one| one.$word() == text)
            }
        }
    };
}

pub(crate) use words;
