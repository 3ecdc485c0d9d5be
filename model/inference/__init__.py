"""Everything that runs a finished model: engine, sampling, grammars, streaming, the microscope."""
