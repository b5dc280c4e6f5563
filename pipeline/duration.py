"""Format durations for people to read."""


def duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, or as hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
