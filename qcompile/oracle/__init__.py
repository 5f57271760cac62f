"""The integer oracle: what an integer-only graph computes, in numpy integers, independent of the code that makes such graphs."""
