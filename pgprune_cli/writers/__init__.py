"""Writers: one file per export format, and the modelling code that travels with an exported model."""
