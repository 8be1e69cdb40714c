"""Types of the compiled core; one section per fragment of luo/core/."""
