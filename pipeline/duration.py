"""Durations as people read them."""


def duration(seconds: float) -> str:
    """Seconds in the units that people would use."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
