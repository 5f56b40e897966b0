"""From pictures to faces and expressions."""
