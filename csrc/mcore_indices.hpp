// The sample index of megatron-core's GPTDataset: where each sample begins among documents laid back to back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cpt {

// Fills `rows` with num_samples + 1 pairs: the place in `order` of the document in which a sample begins, and the token
// of it. Samples begin seq_length tokens apart and read one token more, their last label; the documents must hold
// num_samples * seq_length + 1 tokens.
template <typename Index>
void sample_index(const std::int32_t* lengths, const std::int32_t* order, std::int64_t num_documents,
                  std::int64_t seq_length, std::int64_t num_samples, Index* rows) {
  std::int64_t place = 0;
  std::int64_t offset = 0;  // the token of document order[place] at which the next sample begins
  rows[0] = 0;
  rows[1] = 0;
  for (std::int64_t sample = 1; sample <= num_samples; ++sample) {
    std::int64_t needed = seq_length + 1;  // one more than the inputs: the last label
    for (std::int64_t there = lengths[order[place]] - offset; there < needed && place + 1 < num_documents;
         there = lengths[order[place]]) {
      needed -= there;
      ++place;
      offset = 0;
    }
    offset += needed - 1;  // the last label is the first input of the next sample
    rows[2 * sample] = static_cast<Index>(place);
    rows[2 * sample + 1] = static_cast<Index>(offset);
  }
}

}  // namespace cpt
