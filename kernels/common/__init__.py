"""What the op families share: registration, argument checks, trial inputs, and Triton's handling of rows."""
