"""Tables and figures of what experiments found."""
