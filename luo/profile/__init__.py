"""What a live update cost, for people: everything is drawn from the ``luo-run/1`` document."""
