//! What is wrong with a variable, as it is printed.

/// One problem: the variable, its value, what was expected and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error(
        "{name} is not set: expected {expected}; set it in the environment, in .env or with -e {name}=VALUE"
    )]
    NotSet { name: &'static str, expected: String },

    #[error("{name}={value}: expected {expected}{}", if_any("; ", remedy))]
    Wrong {
        name: &'static str,
        /// Quoted, shortened, without secrets.
        value: String,
        expected: String,
        /// What to do; may be empty.
        remedy: String,
    },

    /// The file that a variable names is not what the variable requires.
    #[error("{name}{}: {what}", if_any("=", path))]
    File {
        name: &'static str,
        /// Empty if it may be a secret.
        path: String,
        what: String,
    },

    #[error("{name} and {name}_FILE are both set: unset one of them")]
    SetTwice { name: &'static str },

    /// Two variables contradict each other.
    #[error("{name} {what}")]
    Conflict { name: &'static str, what: String },

    /// A source of variables is wrong: `-e`, the environment or a file.
    #[error("{0}")]
    Source(String),
}

impl Problem {
    /// The variable that is wrong.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Self::NotSet { name, .. }
            | Self::Wrong { name, .. }
            | Self::File { name, .. }
            | Self::SetTwice { name }
            | Self::Conflict { name, .. } => Some(name),
            Self::Source(_) => None,
        }
    }
}

fn if_any(before: &str, text: &str) -> String {
    match text {
        "" => String::new(),
        text => format!("{before}{text}"),
    }
}

/// All errors of the variables, one line each. Exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))]
pub struct WrongVariables(pub Vec<Problem>);
