# Header of the compiled core: C types and constants, by fragment, in the order of the includes.
